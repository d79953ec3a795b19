"""Every format against what it means, written out number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moiety.errors import ConfigError, FormatError
from moiety.formats import FORMATS, FP4, NF4, Format, format_named
from moiety.formats.numbers import Codes, dequantize, quantize, relative_error

SHAPES = ((5, 32), (3, 7, 130), (1, 1), (4, 33), (2, 128), (0, 32))
# The largest error of a group's numbers, in shares of the group's largest; a row's for those by row.
SHARE = {
    "integer8": 0.5 / 127,
    "integer4": 0.5 / 7,
    "minimum": 0.5 / 15 * 2,
    "float8": 1 / 16,
    "mxfp4": 1 / 4,
    "nf4": 0.153,
}
HALF = 2**-11  # a float16 scale is off by so much


def meant(codes: Codes, form: Format, place: tuple[int, ...]) -> float:
    """One number from its code, scale and minimum, in plain Python."""
    code = codes.code[place]
    if form.kind in ("float32", "bfloat16"):
        return float(code)
    assert codes.scale is not None
    group = (*place[:-1], place[-1] // form.group)
    scale = codes.scale[group]
    factor = 2.0 ** (int(scale) - 127) if form.scale_bits == 8 else float(scale)
    if form.kind == "float8":
        byte = int(code)
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        return factor * (-size if byte >> 7 else size)
    if form.kind == "table":
        return factor * form.values[int(code)]
    low = 0.0 if codes.minimum is None else float(codes.minimum[group])
    return factor * (int(code) - form.zero) + low


def share(form: Format) -> float:
    if form.minimum:
        return SHARE["minimum"]
    return SHARE[
        f"integer{form.bits}" if form.kind == "integer" else {8: "mxfp4"}.get(form.scale_bits, "nf4")
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_mean_what_the_format_says(name: str, shape: tuple[int, ...]) -> None:
    form = FORMATS[name]
    weight = torch.randn(shape) * torch.logspace(-2, 2, shape[-1])
    codes = quantize(weight, form)
    groups = math.ceil(shape[-1] / form.group)
    assert codes.code.shape == weight.shape
    assert (codes.scale is None) == (form.scale_bits == 0) and (codes.minimum is None) == (not form.minimum)
    for extra in codes[1:]:
        assert extra is None or extra.shape == (*shape[:-1], groups)
    found = dequantize(codes, form)
    assert found.dtype == torch.float32 and found.shape == weight.shape
    for flat in range(0, weight.numel(), max(weight.numel() // 60, 1)):
        place = tuple(int(one) for one in torch.unravel_index(torch.tensor(flat), shape))
        assert float(found[place]) == pytest.approx(meant(codes, form, place), rel=1e-6, abs=1e-30)


@pytest.mark.parametrize(
    "name", [name for name, form in FORMATS.items() if form.scale_bits and form.kind != "float8"]
)
def test_no_number_is_further_away_than_the_format_allows(name: str) -> None:
    form = FORMATS[name]
    weight = torch.randn(64, 5 * form.group) * torch.logspace(-1, 1, 5 * form.group)
    error = (dequantize(quantize(weight, form), form) - weight).abs().unflatten(1, (-1, form.group))
    largest = weight.abs().unflatten(1, (-1, form.group)).amax(-1, keepdim=True)
    if form.by_row:
        largest = largest.amax(1, keepdim=True)
    # int4 may shrink a scale where that makes the squared error smaller: its largest number pays
    slack = 0.3 if form.bits == 4 and form.kind == "integer" and not form.minimum else 0.0
    assert bool((error <= (share(form) + HALF + slack) * largest).all())


def test_int4_is_at_least_as_good_as_the_plain_scale() -> None:
    weight = torch.randn(400, 32)
    extreme = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    scale = (extreme / -8).half().float()
    plain = (weight / scale).round().clamp(-8, 7) * scale
    found = dequantize(quantize(weight, FORMATS["int4-g32"]), FORMATS["int4-g32"])
    ours, theirs = (found - weight).square().sum(1), (plain - weight).square().sum(1)
    assert bool((ours <= theirs * 1.0001).all()) and ours.sum() < 0.97 * theirs.sum()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_and_what_was_rounded_stays(name: str) -> None:
    form = FORMATS[name]
    weight = torch.randn(4, 2 * form.group)
    weight[1] = 0
    weight[2, : form.group] = 0
    once = dequantize(quantize(weight, form), form)
    assert bool((once[1] == 0).all()) and bool((once[2, : form.group] == 0).all())
    twice = dequantize(quantize(once, form), form)
    # a minimum is rounded anew, and float16 scales of scales may fall on another neighbour
    assert (twice - once).norm() <= 4e-3 * once.norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_is_refused(name: str, bad: float) -> None:
    weight = torch.randn(3, 40)
    weight[2, 39] = bad
    with pytest.raises(FormatError, match="not finite"):
        quantize(weight, FORMATS[name])


def test_tables() -> None:
    assert len(FP4) == len(NF4) == 16 and list(NF4) == sorted(NF4) and NF4[7] == 0
    # the published construction: quantiles of a normal distribution at evenly spread probabilities
    normal = torch.distributions.Normal(0.0, 1.0)
    edge = 0.9677083
    upper, lower = (
        normal.icdf(torch.linspace(edge, 0.5, 9))[:-1],
        -normal.icdf(torch.linspace(edge, 0.5, 8))[:-1],
    )
    wanted = torch.cat([lower, torch.zeros(1), upper.flip(0)]) / upper.max()
    torch.testing.assert_close(torch.tensor(NF4), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-g32", 4.5),
        ("int4-g32-asym", 5.0),
        ("int8-g32", 8.5),
        ("nf4-g64", 4.25),
        ("mxfp4", 4.25),
        ("bf16", 16),
    ],
)
def test_bits_count_scales(name: str, bits: float) -> None:
    assert FORMATS[name].bits_per_weight == bits


def test_names() -> None:
    assert format_named("int4") is FORMATS["int4-g32"] and format_named("nf4") is FORMATS["nf4-g64"]
    with pytest.raises(ConfigError, match="no weight format 'int3'"):
        format_named("int3")


def test_more_bits_and_smaller_groups_are_closer() -> None:
    weight: Tensor = torch.randn(64, 512) * torch.randn(64, 512).exp()
    error = {name: relative_error(weight, form) for name, form in FORMATS.items()}
    assert error["f32"] == 0 and error["bf16"] < error["int8-g32"] < error["int8-g128"] < error["int4-g32"]
    assert error["int4-g32"] < error["int4-g64"] < error["int4-g128"]
    assert error["nf4-g32"] < error["nf4-g128"] and error["int8-g128"] <= error["int8"]

"""Weights to codes and scales and back: what a format means. Every kernel is proved against these two functions.

Groups run along the last dimension, the one that is multiplied over; a last group may be cut off by the edge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.errors import FormatError
from moiety.formats import Format

__all__ = ["Codes", "dequantize", "quantize", "relative_error"]

FLOAT8_MAX = 448.0
E8M0_BIAS = 127
# An int4 group's scale is its largest number's over 8, times one of these, whichever is nearest to the weights.
INT4_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


class Codes(NamedTuple):
    """A quantized matrix or stack of them.

    Args:
        code: (..., C): uint8, one code in a byte; float32 and bfloat16 are their own codes.
        scale: (..., groups) float16, or uint8 powers of two; None where the format has none.
        minimum: (..., groups) float16, or None.
    """

    code: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None


def _groups(values: Tensor, group: int) -> Tensor:
    """(..., C) to (..., groups, group), the last one filled up with zeros."""
    columns = values.shape[-1]
    grouped: Tensor = F.pad(values, (0, -columns % group)).unflatten(-1, (-1, group))
    return grouped


def quantize(weight: Tensor, form: Format) -> Codes:
    """The nearest numbers of a format, (..., C) of any floating point type. Scales are chosen as they are stored.

    Raises:
        FormatError: a weight is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise FormatError(f"weights of shape {tuple(weight.shape)} are not finite; no format can hold them")
    if form.kind in ("float32", "bfloat16"):
        return Codes(weight.to(torch.float32 if form.kind == "float32" else torch.bfloat16))
    columns = weight.shape[-1]
    values = _groups(weight.float(), form.group)
    if form.minimum:
        return _quantize_from_minimum(values, form, columns)
    if form.scale_bits == 8:
        _, exponent = torch.frexp(values.abs().amax(-1))
        scale = (exponent - 3 + E8M0_BIAS).clamp(0, 254).to(torch.uint8)
    else:
        scale = _scale(values, form)
    divided = values * _inverse(_scale_value(scale))[..., None]
    if form.kind == "float8":
        code = divided.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    elif form.kind == "table":
        code = (divided[..., None] - torch.tensor(form.values)).abs().argmin(-1).to(torch.uint8)
    else:
        low, high = (-8, 7) if form.bits == 4 else (-127, 127)
        code = (divided.round().clamp(low, high) + form.zero).to(torch.uint8)
    return Codes(code.flatten(-2)[..., :columns].contiguous(), scale)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _scale_value(scale: Tensor) -> Tensor:
    if scale.dtype == torch.uint8:  # a power of two
        return torch.ldexp(torch.ones(scale.shape), scale.int() - E8M0_BIAS)
    return scale.float()


def _scale(values: Tensor, form: Format) -> Tensor:
    """One float16 scale for each group, (..., groups)."""
    largest = values.abs().amax(-1)
    if form.by_row:
        largest = largest.amax(-1, keepdim=True).expand_as(largest)
    if form.kind == "integer" and form.bits == 4:
        return _int4_scale(values)
    top = {"float8": FLOAT8_MAX, "table": max(form.values, default=1.0), "integer": 127.0}[form.kind]
    return (largest / top).half()


def _int4_scale(values: Tensor) -> Tensor:
    """Signed: the group's largest number gets the code -8, which has no opposite. Least squared error of a few."""
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))[..., 0]
    best = (extreme / -8).half()
    least = torch.full_like(extreme, torch.inf)
    for shrink in INT4_SHRINK:
        scale = (extreme / -8 * shrink).half()
        wide = scale.float()[..., None]
        rounded = (values * _inverse(wide)).round().clamp(-8, 7)
        error = (rounded * wide - values).square().sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _quantize_from_minimum(values: Tensor, form: Format, columns: int) -> Codes:
    top = 2**form.bits - 1
    minimum = values.amin(-1).half()
    scale = ((values.amax(-1) - minimum.float()) / top).half()
    divided = (values - minimum.float()[..., None]) * _inverse(scale.float())[..., None]
    code = divided.round().clamp(0, top).to(torch.uint8).flatten(-2)[..., :columns]
    return Codes(code.contiguous(), scale, minimum)


def dequantize(codes: Codes, form: Format) -> Tensor:
    """The weights that codes and scales mean, (..., C) float32."""
    if form.kind in ("float32", "bfloat16"):
        return codes.code.float()
    assert codes.scale is not None, form
    columns = codes.code.shape[-1]
    grouped = _groups(codes.code, form.group)
    if form.kind == "float8":
        values = grouped.view(torch.float8_e4m3fn).float()
    elif form.kind == "table":
        values = torch.tensor(form.values)[grouped.int()]
    else:
        values = grouped.float() - form.zero
    values = values * _scale_value(codes.scale)[..., None]
    if codes.minimum is not None:
        values = values + codes.minimum.float()[..., None]
    return values.flatten(-2)[..., :columns].contiguous()


def relative_error(weight: Tensor, form: Format) -> float:
    """Root of the mean squared error over that of the weights themselves: what a format costs before anything runs."""
    wide = weight.float()
    difference = dequantize(quantize(weight, form), form) - wide
    return float(difference.norm() / wide.norm().clamp_min(torch.finfo(torch.float32).tiny))

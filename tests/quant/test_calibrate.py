"""Bits where they are worth most: a model trained here for seconds predicts better with them there than elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moiety.errors import ConfigError, UsageError
from moiety.formats import FORMATS
from moiety.model.slots import packed_matrices
from moiety.model.transformer import Transformer
from moiety.quant.calibrate import Calibration, calibrate
from moiety.quant.quantize import Policy, quantize
from moiety.train.data import Batch
from moiety.train.quality import compare
from tests import tiny as models
from tests.train import tiny

LOW, HIGH = "int4-g64", "int8-g32"
BASE = Policy(experts=LOW, shared="", dense="", attention="", head="")


class Trained(NamedTuple):
    model: Transformer
    calibration: Calibration
    held_out: list[Batch]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model of eight experts, some of which matter much more than others."""
    torch.manual_seed(0)
    data, tokenizer = tiny.text(tmp_path_factory.mktemp("text"))
    model = tiny.model(tokenizer.vocab_size, experts=8, d_ff=64, d_model=64)
    tiny.run(model, data, tiny.options(steps=60))
    batches = list(itertools.islice(data.batches(B=8, S=tiny.LENGTH, seed=9), 24))
    first, second = batches[:8], batches[8:]
    model.eval()
    measured = calibrate(model, [(one.tokens_BS, one.targets_BS) for one in first], low=LOW, high=HIGH)
    return Trained(model, measured, second)


def packed(trained: Trained, policy: object) -> tuple[Transformer, int]:
    model = copy.deepcopy(trained.model)
    return model, quantize(model, policy).bytes_after  # type: ignore[arg-type]


def with_gain(calibration: Calibration, gain: Callable[[Tensor], Tensor]) -> Calibration:
    layers = {
        path: dataclasses.replace(one, gain_E=gain(one.gain_E)) for path, one in calibration.layers.items()
    }
    return dataclasses.replace(calibration, layers=layers)


def test_same_bytes_and_a_smaller_divergence(trained: Trained) -> None:
    measured = trained.calibration
    ways = {
        "measured": measured,
        "inverted": with_gain(measured, lambda gain_E: 1 / gain_E.clamp(min=1e-12)),
        "by number": with_gain(measured, lambda gain_E: torch.arange(len(gain_E), 0, -1)),
    }
    made = {name: packed(trained, way.policy(BASE, bits=5.5)) for name, way in ways.items()}
    assert len({size for _, size in made.values()}) == 1
    uniform = {"low": packed(trained, BASE), "high": packed(trained, dataclasses.replace(BASE, experts=HIGH))}
    found = compare(
        trained.model, {name: model for name, (model, _) in {**made, **uniform}.items()}, trained.held_out
    )
    kl = {name: one.kl.value for name, one in found.items()}
    # one token near a tie may choose other experts in eight bits: that is most of the mean, and not of its lower end
    assert found["high"].kl.low < kl["measured"] < 0.9 * kl["by number"], kl
    assert kl["measured"] < 0.75 * kl["inverted"] and kl["measured"] < 0.75 * kl["low"], kl
    assert found["measured"].kl.high < found["inverted"].kl.low, "beyond what chance explains"


def test_the_budget_is_kept(trained: Trained) -> None:
    measured = trained.calibration
    sizes = {}
    for bits in (4.3, 5.0, 6.3, 9.0):
        policy = measured.policy(BASE, bits=bits)
        formats = [name for names in policy.experts.values() for name in names]
        assert set(formats) <= {LOW, HIGH} and len(formats) == 16
        model = copy.deepcopy(trained.model)
        lines = [line for line in quantize(model, policy).lines if ".experts." in line.name]
        tiles = [one.tiles for path, one in packed_matrices(model).items() if ".experts." in path]
        sizes[bits] = sum(one.nbytes for one in tiles)
        weights = sum(line.shape[0] * line.shape[1] * line.shape[2] for line in lines)
        least = sum(len(one.gain_E) * one.bytes_low for one in measured.layers.values())
        assert least <= sizes[bits] <= bits * weights / 8
    assert sorted(sizes.values()) == list(sizes.values()) and len(set(sizes.values())) == 4
    with pytest.raises(ConfigError, match="too few"):
        measured.policy(BASE, bits=3.0)


def test_what_is_measured(trained: Trained) -> None:
    model = trained.model
    assert all(parameter.requires_grad for parameter in model.parameters()), "as it was before"
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    for path, one in trained.calibration.layers.items():
        assert model.get_submodule(path).count == len(one.pairs_E) == 8
        assert one.pairs_E.sum() > 0 and bool((one.moved_E >= 0).all()) and bool((one.gain_E > 0).any())
        assert bool((one.moved_E[one.pairs_E == 0] == 0).all())
        shapes = [
            tuple(model.get_submodule(path).get_parameter(name).shape[1:]) for name in ("gate_up", "down")
        ]
        assert one.weights == sum(rows * columns for rows, columns in shapes)
        assert (
            one.bytes_high
            == sum(rows * columns for rows, columns in shapes) * FORMATS[HIGH].bits_per_weight / 8
        )


def test_an_exact_format_moves_nothing_and_gains_nothing() -> None:
    model = models.model("mixtral").eval()
    tokens = models.tokens(model, 2, 9)
    measured = calibrate(model, [(tokens, tokens)], low="f32", high="f32")
    for one in measured.layers.values():
        assert one.moved_E.max() < 1e-9 and one.gain_E.abs().max() < 1e-9
    rough = calibrate(model, [(tokens, tokens)], low="int4-g32", high="f32")
    assert all(bool((one.gain_E[one.pairs_E > 0] > 0).all()) for one in rough.layers.values())


def test_nothing_to_calibrate() -> None:
    model = models.model("llama").eval()
    tokens = models.tokens(model, 1, 4)
    for batches in ([(tokens, tokens)], []):
        with pytest.raises(UsageError, match="nothing to calibrate"):
            calibrate(model, batches)

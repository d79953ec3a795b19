"""A Mixture-of-Experts made into one dense model: its experts averaged by how much they were used on a text.

It is no inverse of upcycling. What is lost is measured on the same text and said.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moiety import cost, storage
from moiety.config import ModelConfig, require, to_dict
from moiety.errors import CheckFailed
from moiety.model import checkpoint, hub
from moiety.model.convert import read_tokenizer, write_beside
from moiety.model.families import family_for
from moiety.model.layout import write_json
from moiety.model.loss import IGNORED
from moiety.model.parts import Parts, hollow, run
from moiety.model.transformer import Transformer
from moiety.moe.layer import MoE
from moiety.moe.upcycle import mixed
from moiety.routing import Routing
from moiety.train.data import Batch
from moiety.train.evaluate import real_tokens
from moiety.train.loop import train
from moiety.train.options import TrainOptions
from moiety.train.run import prepare_text
from moiety.train.upcycle import checksum, has_tokenizer

__all__ = ["RECEIPT", "DenseReceipt", "dense", "dense_config"]

RECEIPT = "dense.json"


@dataclass(frozen=True, kw_only=True)
class DenseReceipt:
    """What became of a model, in nats per token of the same held-out text.

    Args:
        parent: Path and sha256.
        written_as: The layout, and why.
        total_before: Parameters of the parent.
        total_after: Parameters of the dense model.
        tokens: Scored positions.
        loss_before: Of the parent.
        loss_averaged: Of the average, before any training.
        loss_after: Of what was written.
        steps: Of distillation.
        weight_LE: Mean combine weight of each expert of each layer with experts, as measured.
    """

    parent: dict[str, str]
    written_as: str
    total_before: int
    total_after: int
    tokens: int
    loss_before: float
    loss_averaged: float
    loss_after: float
    steps: int
    weight_LE: tuple[tuple[float, ...], ...]


def dense(
    source: str | Path,
    target: str | Path,
    batches: Sequence[Batch],
    *,
    texts: Sequence[str] = (),
    distill: TrainOptions | None = None,
) -> DenseReceipt:
    """Write the dense model whose feed-forwards are the experts' average, weighted by their mean combine weight.

    Args:
        source: A model with experts.
        target: A folder that is new or was written by this program.
        batches: Held-out text: for the weights, and for the loss before and after.
        texts: To distil on, as for `train.run.prepare_text`.
        distill: Train it towards the parent's probabilities afterwards; both are in memory then.

    Raises:
        ConfigError: a dense model, or experts whose average is no feed-forward of a dense model.
        CheckFailed: a loss is not finite; nothing was written.
        FormatError, StorageError: as of the loader and of the writer.
    """
    place = hub.resolve(source)
    with checkpoint.open_parts(place) as parts:
        config = dense_config(parts.config)
        used = _Used()
        before = _loss(parts, batches, used)
        average = _Average(parts=parts, config=config, used=used)
        dtypes = {name: parts.dtypes[average.like(name)] for name in hollow(config).state_dict()}
        made = Parts(config=config, dtypes=dtypes, read=average.read)
        middle = _loss(made, batches)
        model, options = hollow(config, dtypes), dict[str, Any](fetch=made.fetch)
        if distill is not None:
            model.load_state_dict({name: average.read(name).float() for name in dtypes}, assign=True)
            _distil(model, place, texts, distill)
            options = {"dtype": parts.dtypes["embed.weight"]}
        needed_bytes = checkpoint.size_bytes(model) + (1 << 24)
        with storage.new_folder(target, needed_bytes=needed_bytes) as folder:
            write_beside(folder, model, place, with_tokenizer=has_tokenizer(place), **options)
            with checkpoint.open_parts(folder) as stored:
                after = _loss(stored, batches)
            if not all(map(math.isfinite, (before, middle, after))):
                raise CheckFailed("a loss is not finite, so nothing was written", hint="look at the parent")
            receipt = DenseReceipt(
                parent={"path": str(place), "sha256": checksum(place)},
                written_as=family_for(config).reason,
                total_before=cost.parameters(parts.config).total,
                total_after=cost.parameters(config).total,
                tokens=sum(int((one.targets_BS != IGNORED).sum()) for one in batches),
                loss_before=before,
                loss_averaged=middle,
                loss_after=after,
                steps=0 if distill is None else distill.steps,
                weight_LE=tuple(tuple(used.weights(layer).tolist()) for layer in parts.config.moe_layers),
            )
            write_json(folder / RECEIPT, to_dict(receipt))
    return receipt


def dense_config(config: ModelConfig) -> ModelConfig:
    """The config of the dense model: a feed-forward as wide as an expert and the shared one together.

    Where layers differ in width, the narrow ones are filled up with zeros.

    Raises:
        ConfigError: a dense model, or experts whose average is no feed-forward of a dense model.
    """
    moe = config.moe
    require(moe is not None, "this model is dense already")
    assert moe is not None
    require(
        moe.activation != "clamped_swiglu"
        and not moe.weigh_input
        and not (moe.null_experts and moe.null_kind == "identity"),
        "these experts have no average that a dense model can hold: clamped activation, weighed input or null experts",
    )
    assert moe.activation != "clamped_swiglu"
    alike = not config.dense_layers or (config.activation, config.gated, config.feed_forward_bias) == (
        moe.activation,
        moe.gated,
        moe.bias,
    )
    require(alike, "its dense layers have another activation, gate or bias than its experts")
    require(
        not moe.shared_d_ff or moe.shared_bias == moe.bias,
        "its shared expert differs from the others in biases",
    )
    width = moe.d_ff + moe.shared_d_ff
    return dataclasses.replace(
        config,
        moe=None,
        dense_layers=(),
        d_ff=max(width, config.d_ff) if config.dense_layers else width,
        activation=moe.activation,
        gated=moe.gated,
        feed_forward_bias=moe.bias,
    )


class _Used:
    """How much of each layer's answer came from each expert, and how open its shared expert's gate was."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.tokens: dict[int, int] = {}
        self.gates: dict[int, list[Tensor]] = {}

    def see(self, layer: int, module: nn.Module, x_TD: Tensor, routing: Routing | None) -> None:
        """One batch in one layer."""
        if routing is None:
            return
        assert isinstance(module, MoE), type(module)
        sums = self.sums.setdefault(layer, torch.zeros(routing.experts, dtype=torch.float64))
        sums.index_add_(0, routing.expert_N, routing.weight_N.double())
        real = routing.tokens if routing.valid_T is None else int(routing.valid_T.sum())
        self.tokens[layer] = self.tokens.get(layer, 0) + real
        if module.shared_gate is not None:
            self.gates.setdefault(layer, []).append(module.shared_gate(x_TD).sigmoid().flatten())

    def weights(self, layer: int) -> Tensor:
        """Mean combine weight of each expert, zero where it was not chosen, (E,)."""
        return self.sums[layer] / self.tokens[layer]

    def gate(self, layer: int) -> float:
        """Mean of the shared expert's gate; 1 without one."""
        return float(torch.cat(self.gates[layer]).mean()) if layer in self.gates else 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Average:
    """The dense model's tensors, made when they are wanted."""

    parts: Parts
    config: ModelConfig
    used: _Used

    def like(self, name: str) -> str:
        """The parent's tensor that stands for one of ours."""
        return name if name in self.parts.dtypes else name.replace("feed_forward.", "feed_forward.experts.")

    def read(self, name: str) -> Tensor:
        """A tensor of the dense model, in the dtype of the parent's."""
        stored = self.parts.dtypes[self.like(name)]
        if "feed_forward." not in name:
            return self.parts.read(name)
        begin, _, leaf = name.partition("feed_forward.")
        layer, parent = int(begin.split(".")[1]), self.parts.config
        if not parent.is_moe(layer):
            return self._filled([self.parts.read(name)], leaf).to(stored)
        weight_E = self.used.weights(layer)
        moe = parent.moe
        assert moe is not None
        total = float(weight_E[: moe.at(layer).experts].sum())
        one = mixed(self.parts.read(self.like(name)), weight_E / total)
        made = [one * total if leaf.startswith("down") else one]
        if moe.shared_d_ff:
            shared = self.parts.read(f"{begin}feed_forward.shared.{leaf}").float()
            made.append(shared * self.used.gate(layer) if leaf.startswith("down") else shared)
        return self._filled(made, leaf).to(stored)

    def _filled(self, made: Sequence[Tensor], leaf: str) -> Tensor:
        """Feed-forwards side by side, and zeros up to the width."""
        if leaf == "down_bias":
            return torch.stack([*made]).sum(0)
        halves = [one.movedim(-1, 0) if leaf == "down" else one for one in made]
        parts = 2 if leaf.startswith("gate_up") else 1
        columns = []
        for half in range(parts):
            rows = torch.cat([one.chunk(parts)[half] for one in halves])
            lack = self.config.d_ff - len(rows)
            columns.append(torch.cat([rows, rows.new_zeros(lack, *rows.shape[1:])]))
        whole = torch.cat(columns)
        return whole.movedim(0, -1) if leaf == "down" else whole


@torch.no_grad()
def _loss(parts: Parts, batches: Sequence[Batch], used: _Used | None = None) -> float:
    """Nats per token."""
    inputs = [(one.tokens_BS, real_tokens(one.targets_BS)) for one in batches]
    outputs = run(parts, inputs, None if used is None else used.see, dtype=torch.float32)
    pairs = zip(outputs, batches, strict=True)
    nats = sum(float(output.cross_entropy(one.targets_BS)) for output, one in pairs)
    return nats / sum(int((one.targets_BS != IGNORED).sum()) for one in batches)


def _distil(model: Transformer, place: Path, texts: Sequence[str], options: TrainOptions) -> None:
    """Train a model in place towards the probabilities of the one it was made from."""
    teacher = checkpoint.load(place, dtype=torch.float32).requires_grad_(False)
    with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
        text = prepare_text(Path(folder), texts, vocab_size=0, tokenizer=read_tokenizer(place))
        for _ in train(model, text.data, options, teacher=teacher):
            pass

"""How well a model predicts held-out text: bits per byte, exactly, and who routed what where."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moiety.model.loss import IGNORED
from moiety.model.transformer import Transformer
from moiety.observe.record import Recorder, spans_of
from moiety.observe.stats import counts_by_group
from moiety.train.data import Batch, Source
from moiety.train.preference import answer_nats, objective

__all__ = ["Evaluation", "autocast", "evaluate", "real_tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """One pass over held-out text.

    Args:
        bits_per_byte: By domain.
        nats: Summed loss by domain.
        size_bytes: Scored UTF-8 bytes by domain.
        losses: By domain what is trained for: nats of a token, or of pairs the preference loss of one.
        preferred: By domain the share of pairs whose better answer has gained more; empty where there are none.
        counts_DLE: Pairs of each (domain, MoE layer, expert); None for a dense model. Where layers differ in their
            number of experts, the missing ones of a layer have 0.
        counts_SLE: The same of each sequence; None for a dense model.
        experts_L: Experts of each MoE layer, null experts among them; none for a dense model.
        domain_S: Domain index of each sequence.
        seconds: Wall time.
    """

    bits_per_byte: Mapping[str, float]
    nats: Mapping[str, float]
    size_bytes: Mapping[str, int]
    counts_DLE: npt.NDArray[np.int64] | None
    counts_SLE: npt.NDArray[np.int64] | None
    domain_S: npt.NDArray[np.int64]
    seconds: float
    experts_L: tuple[int, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    preferred: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean_bits_per_byte(self) -> float:
        """Mean over domains, each counting the same whatever its size."""
        return sum(self.bits_per_byte.values()) / max(len(self.bits_per_byte), 1)

    @property
    def mean_loss(self) -> float:
        """Mean of `losses` over domains."""
        return sum(self.losses.values()) / max(len(self.losses), 1)


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 when `dtype` is "bf16"; a context that changes nothing for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


@torch.no_grad()
def evaluate(
    model: Transformer,
    data: Source,
    *,
    batch: int,
    length: int,
    limit: int | None = None,
    dtype: str = "fp32",
    recorder: Recorder | None = None,
) -> Evaluation:
    """Score the held-out text of every domain.

    Args:
        model: Any.
        data: Its held-out split is used.
        batch: Sequences at a time.
        length: Tokens in a sequence.
        limit: Most sequences of a domain; None for all.
        dtype: "fp32" or "bf16".
        recorder: Takes the routing of every batch.
    """
    begun = time.perf_counter()
    training = model.training
    model.eval()
    by_name: dict[str, _Scored] = {}
    pieces: list[list[npt.NDArray[np.int64]]] = []
    domain_S: list[int] = []
    held_out = data.sizes("held_out")
    for number, domain in enumerate(data.domains):
        if held_out[domain]["documents"] == 0:
            continue
        sums = _Scored()
        for piece in data.evaluation(domain, B=batch, S=length, limit=limit):
            scored, counts = _score(model, piece, dtype, recorder)
            sums = sums.plus(scored)
            pieces += [counts] if counts else []
            domain_S += [number] * len(piece.tokens_BS)
        if sums.size_bytes:
            by_name[domain] = sums
    model.train(training)
    stacked = _stacked(pieces) if pieces else None
    by_sequence = np.array(domain_S, dtype=np.int64)
    by_domain = None
    if stacked is not None:
        by_domain = np.stack([stacked[by_sequence == number].sum(0) for number in range(len(data.domains))])
    return Evaluation(
        bits_per_byte={name: one.nats / math.log(2) / one.size_bytes for name, one in by_name.items()},
        nats={name: one.nats for name, one in by_name.items()},
        size_bytes={name: one.size_bytes for name, one in by_name.items()},
        counts_DLE=by_domain,
        counts_SLE=stacked,
        domain_S=by_sequence,
        seconds=time.perf_counter() - begun,
        experts_L=tuple(layer.shape[1] for layer in pieces[0]) if pieces else (),
        losses={name: one.loss / one.weight for name, one in by_name.items()},
        preferred={name: one.preferred / one.pairs for name, one in by_name.items() if one.pairs},
    )


class _Scored(NamedTuple):
    """Sums over batches."""

    nats: float = 0.0
    size_bytes: int = 0
    loss: float = 0.0
    weight: int = 0
    pairs: int = 0
    preferred: int = 0

    def plus(self, more: _Scored) -> _Scored:
        """Both together."""
        return _Scored(*(one + other for one, other in zip(self, more, strict=True)))  # type: ignore[arg-type]


def real_tokens(targets_BS: Tensor) -> Tensor:
    """False for the padding at the end of a sequence: everything after its last scored target, bool (B, S)."""
    return (targets_BS != IGNORED).flip(1).cummax(1).values.flip(1)


def _score(
    model: Transformer, piece: Batch, dtype: str, recorder: Recorder | None
) -> tuple[_Scored, list[npt.NDArray[np.int64]]]:
    """Sums of a batch, and of each MoE layer its pairs of each (sequence, expert)."""
    device = next(model.parameters()).device
    tokens_BS, targets_BS = piece.tokens_BS.to(device), piece.targets_BS.to(device)
    valid_BS = real_tokens(targets_BS)
    with autocast(dtype, device):
        output = model(tokens_BS, valid_BS=valid_BS)
        found = objective(output, piece)
        nats = found.value if piece.preference is None else answer_nats(output, piece).sum().item()
    if recorder is not None:
        spans = spans_of(tokens_BS, recorder.next_request, valid_BS=valid_BS, domain_BS=piece.domain_BS)
        recorder.add(output.routing, spans)
    sequences, positions = tokens_BS.shape
    sequence_T = torch.arange(sequences, device=device).repeat_interleave(positions)
    layers = [counts_by_group(routing, sequence_T, sequences) for routing in output.routing.values()]
    pairs = 0 if piece.preference is None else piece.scored
    return _Scored(nats, piece.target_bytes, found.value, piece.scored, pairs, found.preferred), layers


def _stacked(pieces: list[list[npt.NDArray[np.int64]]]) -> npt.NDArray[np.int64]:
    """Pairs of each (sequence, layer, expert) from those of each piece's layers, zeros where a layer has fewer."""
    width = max(layer.shape[1] for layer in pieces[0])
    padded = [[np.pad(layer, ((0, 0), (0, width - layer.shape[1]))) for layer in layers] for layers in pieces]
    return np.concatenate([np.stack(layers, axis=1) for layers in padded])

"""What a batch is trained for: the next token, a teacher's, or the better answer of a pair (DPO, arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.model.transformer import ModelOutput, Transformer
from moiety.moe.packed import PackedExperts, PackedFeedForward, PackedLinear
from moiety.train.data import Batch

__all__ = ["Objective", "answer_nats", "objective", "preference_loss", "references"]


class Objective(NamedTuple):
    """What a batch costs, summed over its targets or pairs.

    Args:
        loss: To be differentiated; of pairs only its gradient means something.
        value: Its value.
        preferred: Pairs whose better answer the model has come to like more than the worse one.
    """

    loss: Tensor
    value: float
    preferred: int = 0


def objective(output: ModelOutput, batch: Batch, teacher: Transformer | None = None) -> Objective:
    """Cross entropy in nats of scored targets, with a teacher the divergence from it; of pairs the preference loss.

    That one needs the log-probabilities of whole answers before it knows what each token's gradient is worth: they are
    worked out first, and a token's cross entropy is then multiplied by the slope of the loss at its answer.
    """
    device = output.hidden.device
    targets_BS = batch.targets_BS.to(device)
    if teacher is not None:
        valid_BS = None if batch.valid_BS is None else batch.valid_BS.to(device)
        with torch.no_grad():
            wanted = teacher(batch.tokens_BS.to(device), valid_BS=valid_BS, lengths=batch.lengths)
        loss = output.divergence(wanted, targets_BS)
        return Objective(loss, loss.item())
    if batch.preference is None:
        loss = output.cross_entropy(targets_BS)
        return Objective(loss, loss.item())
    nats_N = answer_nats(output, batch).requires_grad_()
    with torch.enable_grad():
        reference_N = batch.preference.reference_N.to(nats_N.device)
        value = preference_loss(nats_N, reference_N, batch.preference.beta)
        (slope_N,) = torch.autograd.grad(value, nats_N)
    if batch.lengths:
        counts_N = torch.tensor(batch.lengths, device=slope_N.device)
        slope_BS = slope_N.repeat_interleave(counts_N)[None]
    else:
        slope_BS = slope_N[:, None].expand_as(targets_BS)
    loss = output.cross_entropy(
        targets_BS, slope_BS.to(torch.promote_types(output.hidden.dtype, torch.float32))
    )
    return Objective(loss, value.item(), int((_margins(nats_N, reference_N, 1.0) > 0).sum()))


def preference_loss(nats_N: Tensor, reference_N: Tensor, beta: float) -> Tensor:
    """Sum over pairs of -ln sigmoid(beta * (how much more likely the better answer has become than the worse one)).

    Args:
        nats_N: -ln p of each answer, the better and the worse one in turn.
        reference_N: ln p of each before training.
        beta: Factor on the difference.
    """
    return -F.logsigmoid(_margins(nats_N, reference_N, beta)).sum()


def _margins(nats_N: Tensor, reference_N: Tensor, beta: float) -> Tensor:
    gained_P2 = (-nats_N - reference_N).view(-1, 2)
    return beta * (gained_P2[:, 0] - gained_P2[:, 1])


@torch.no_grad()
def answer_nats(output: ModelOutput, batch: Batch) -> Tensor:
    """-ln p of the scored targets of each sequence, (N,) float64, without gradient."""
    targets_BS, hidden = batch.targets_BS.to(output.hidden.device), output.hidden.detach()
    if batch.lengths:
        pieces = [*zip(hidden.split(batch.lengths, 1), targets_BS.split(batch.lengths, 1), strict=True)]
    else:
        pieces = [*zip(hidden.split(1), targets_BS.split(1), strict=True)]
    nats = [replace(output, hidden=part).cross_entropy(target).double() for part, target in pieces]
    return torch.stack(nats)


def references(model: Transformer, batches: Iterable[Batch], products: torch.autocast) -> Tensor:
    """ln p of every answer by the model as it is, (N,) float64, in the order of the batches.

    By the products that training has, packed weights' too, so that the first step finds every pair where it was.

    Args:
        model: In evaluation mode afterwards.
        batches: All of them, unshuffled.
        products: What training runs under.
    """
    model.eval()
    packed = [
        one for one in model.modules() if isinstance(one, PackedLinear | PackedExperts | PackedFeedForward)
    ]
    for module in packed:
        module.train()
    with torch.enable_grad(), products:
        found = [_answers(model, batch) for batch in batches]
    model.eval()
    return torch.cat(found)


def _answers(model: Transformer, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    valid_BS = None if batch.valid_BS is None else batch.valid_BS.to(device)
    return -answer_nats(
        model(batch.tokens_BS.to(device), valid_BS=valid_BS, lengths=batch.lengths), batch
    ).cpu()

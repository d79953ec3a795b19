"""Experts out of a dense feed-forward, and one feed-forward out of experts: tensors in, tensors out.

An expert is a slice of a copy. With G slices, expert e is slice e % G of copy e // G. The weights of the experts
that a token chose sum to 1, and down projections of slices are multiplied by G, so that G slices of equal weight are
the whole again (arXiv 2410.07524 calls the copies' slices a virtual group).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Cut", "cluster_rows", "expert_tensor", "mixed", "random_rows"]

ROUNDS = 30  # of k-means at most


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How an expert is made.

    Args:
        slices: G, in how many slices a copy is cut.
        drop: Share of the inner columns that each expert draws anew (arXiv 2502.19261).
        noise: Standard deviation of what is added to matrices, as a share of the matrix's own.
        silent: Down projections are zero: the expert answers nothing yet.
        seed: Of everything drawn.
    """

    slices: int = 1
    drop: float = 0.0
    noise: float = 0.0
    silent: bool = False
    seed: int = 0


def expert_tensor(dense: Tensor, leaf: str, cut: Cut, *, layer: int, expert: int) -> Tensor:
    """One tensor of one expert from the same of the dense feed-forward, in its dtype.

    Args:
        dense: `gate_up` (2F, D), `up` (F, D), `down` (D, F), or a bias: (2F,), (F,), (D,).
        leaf: Which of these.
        cut: How.
        layer: For the random numbers: columns drawn anew are the same in all tensors of an expert.
        expert: Its number.
    """
    if leaf.startswith("down"):
        if cut.silent:
            return torch.zeros_like(_slice(dense.T, cut.slices, expert).T if leaf == "down" else dense)
        if leaf == "down_bias":
            return dense
        return cut.slices * _changed(dense, leaf, cut, layer, expert, axis=1)
    parts = dense.chunk(2) if leaf.startswith("gate_up") else (dense,)
    if leaf.endswith("bias"):
        return torch.cat([_slice(part, cut.slices, expert) for part in parts])
    made = (_changed(part, f"{leaf}{n}", cut, layer, expert, axis=0) for n, part in enumerate(parts))
    return torch.cat([*made])


def _changed(matrix: Tensor, name: str, cut: Cut, layer: int, expert: int, *, axis: int) -> Tensor:
    """The expert's slice of a matrix along its inner axis, partly drawn anew, with noise."""
    part = _slice(matrix.movedim(axis, 0), cut.slices, expert)
    if cut.drop or cut.noise:
        wide = matrix.float()
        mean, deviation = wide.mean(), wide.std()
        part = part.float().clone()
        draw = _generator(cut.seed, layer, expert, name)
        if cut.drop:
            order = torch.randperm(len(part), generator=_generator(cut.seed, layer, expert, "columns"))
            rows = order[: round(cut.drop * len(part))]
            fresh = torch.randn((len(rows), part.shape[1]), generator=draw)
            part[rows] = mean + deviation * fresh
        if cut.noise:
            part += cut.noise * deviation * torch.randn(part.shape, generator=draw)
    return part.to(matrix.dtype).movedim(0, axis)


def _slice(rows: Tensor, slices: int, expert: int) -> Tensor:
    return rows.chunk(slices)[expert % slices]


def random_rows(copies: int, width: int, deviation: float, *, layer: int, seed: int) -> Tensor:
    """Normal router rows, (copies, D) float32."""
    return deviation * torch.randn(copies, width, generator=_generator(seed, layer, 0, "router"))


def cluster_rows(x_TD: Tensor, clusters: int, *, layer: int, seed: int) -> Tensor:
    """Router rows (clusters, D) by k-means over the directions of hidden states.

    What all states share, their mean, is taken out and tells no router anything. Means of clusters are chosen apart
    from each other (k-means++), moved until no state changes its cluster, and scaled so that logits have standard
    deviation 1 over tokens and clusters.

    Args:
        x_TD: Inputs of the feed-forward, at least one a cluster.
        clusters: How many.
        layer: For the random numbers.
        seed: Likewise.
    """
    draw = _generator(seed, layer, 0, "clusters")
    x_TD = x_TD.float()
    mean_D = x_TD.mean(0)
    unit_TD = F.normalize(x_TD - mean_D, dim=1)
    centre_CD = unit_TD[torch.randint(len(unit_TD), (1,), generator=draw)]
    while len(centre_CD) < clusters:
        distance_T = (1 - unit_TD @ centre_CD.T).amin(1).clamp(min=1e-9)
        chosen = torch.multinomial(distance_T, 1, generator=draw)
        centre_CD = torch.cat([centre_CD, unit_TD[chosen]])
    before_T = torch.full((len(unit_TD),), -1)
    for _ in range(ROUNDS):
        near_TC = unit_TD @ centre_CD.T
        mine_T = near_TC.argmax(1)
        if torch.equal(mine_T, before_T):
            break
        before_T = mine_T
        sums_CD = torch.zeros_like(centre_CD).index_add_(0, mine_T, unit_TD)
        empty_C = torch.bincount(mine_T, minlength=clusters) == 0
        sums_CD[empty_C] = unit_TD[near_TC.amax(1).topk(int(empty_C.sum()), largest=False).indices]
        centre_CD = F.normalize(sums_CD, dim=1)
    shared_D = F.normalize(mean_D, dim=0)
    rows_CD = centre_CD - (centre_CD @ shared_D)[:, None] * shared_D
    return rows_CD / (x_TD @ rows_CD.T).std().clamp(min=1e-6)


def mixed(stack: Tensor, share_E: Tensor) -> Tensor:
    """Experts' tensors (E, ...) averaged with weights that sum to 1, float32."""
    total = torch.zeros(stack.shape[1:])
    for part, share in zip(stack, share_E.tolist(), strict=True):
        total += share * part.float()
    return total


def _generator(seed: int, layer: int, expert: int, purpose: str) -> torch.Generator:
    """Random numbers of their own for each purpose: tensors may be made in any order, and more than once."""
    digest = hashlib.sha256(f"{seed} {layer} {expert} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

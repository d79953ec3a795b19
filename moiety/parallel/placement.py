"""Which rank holds which expert, with copies of busy ones; what that balances, sends, holds and costs. No torch.

After the description of EPLB (github.com/deepseek-ai/EPLB, arXiv 2412.19437, section 3.4). `global`: the expert with
the most load for each of its copies gets the next copy, then copies are packed into ranks, the heaviest first, each
into the lightest rank with a free slot. `hierarchical`: groups of experts are packed into nodes in the same way first,
so that routing limited to groups stays in few nodes; copies and ranks then inside each node. Unlike there, an expert
gets no more copies than ranks can hold, and no rank holds one twice.

Load is pairs (token, expert); an expert's is shared evenly by its copies. All arrays are of numpy: E experts of a
layer, R ranks, S slots of a rank, T tokens, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moiety.fields import require
from moiety.plan.links import Copies

if TYPE_CHECKING:
    from moiety.tracefile import Chunk, RoutingTrace

__all__ = [
    "MODES",
    "LayerPlacement",
    "Mode",
    "Placement",
    "Reach",
    "contiguous",
    "place",
    "reached",
    "trace_loads",
]

Array = npt.NDArray[Any]
Mode = Literal["auto", "hierarchical", "global"]
MODES: tuple[Mode, ...] = ("auto", "hierarchical", "global")
MOST_TOKENS = 16_384  # whose ranks are counted: the mean then stands to within a percent


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPlacement:
    """Experts of one layer.

    Args:
        expert_RS: The expert in each slot; -1 is an empty slot.
        experts: How many there are; each is in some slot.
    """

    expert_RS: Array
    experts: int

    @cached_property
    def replicas_E(self) -> Array:
        """Copies of each expert."""
        return np.bincount(self.expert_RS[self.expert_RS >= 0], minlength=self.experts)

    @cached_property
    def rank_EC(self) -> Array:
        """The ranks of each expert's copies, ascending; -1 after the last one."""
        rank_EC = np.full((self.experts, int(self.replicas_E.max())), -1)
        rank_N, slot_N = np.nonzero(self.expert_RS >= 0)
        expert_N = self.expert_RS[rank_N, slot_N]
        order_N = np.argsort(expert_N, kind="stable")
        first_E = np.cumsum(self.replicas_E) - self.replicas_E
        place_N = np.arange(len(order_N)) - first_E[expert_N[order_N]]
        rank_EC[expert_N[order_N], place_N] = rank_N[order_N]
        return rank_EC

    def load_R(self, load_E: Array) -> Array:
        """Load of each rank."""
        each_E = np.append(load_E / self.replicas_E, 0.0)
        return np.asarray(each_E[self.expert_RS].sum(1))

    def imbalance(self, load_E: Array) -> float:
        """Load of the busiest rank over the mean; 1 where there is none."""
        load_R = self.load_R(load_E)
        return float(load_R.max() / load_R.mean()) if load_R.any() else 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Experts of all layers.

    Args:
        layers: One of each layer with experts.
        ranks: That hold them.
        nodes: That these are on, one after the other.
        mode: How it was found: contiguous, global or hierarchical.
    """

    layers: tuple[LayerPlacement, ...]
    ranks: int
    nodes: int
    mode: str

    def imbalance(self, loads: Sequence[Array]) -> float:
        """Of a step that waits for the busiest rank in every layer: the sum of those loads over the sum of means."""
        pairs = list(zip(self.layers, loads, strict=True))
        mean = sum(float(load_E.sum()) for load_E in loads) / self.ranks
        return sum(float(layer.load_R(load_E).max()) for layer, load_E in pairs) / mean if mean else 1.0

    def rank_bytes(self, expert_bytes: Sequence[float]) -> Array:
        """Bytes of experts that each rank holds, (R)."""
        sizes = zip(self.layers, expert_bytes, strict=True)
        return np.asarray(sum((layer.expert_RS >= 0).sum(1) * float(size) for layer, size in sizes))

    def moved(self, before: Placement, expert_bytes: Sequence[float]) -> tuple[Copies, Copies]:
        """Bytes of experts that ranks hold and did not hold `before`: of the rank with the most, and of all.

        An expert comes from its own node if a rank there had it, else from another one.

        Raises:
            ConfigError: other ranks, nodes or layers before.
        """
        same = (before.ranks, before.nodes, len(before.layers)) == (self.ranks, self.nodes, len(self.layers))
        require(
            same, f"{before.ranks} ranks on {before.nodes} nodes before, {self.ranks} on {self.nodes} now"
        )
        bytes_R2 = np.zeros((self.ranks, 2))
        for now, then, size in zip(self.layers, before.layers, expert_bytes, strict=True):
            had_RE = _held(then)
            had_NE = had_RE.reshape(self.nodes, -1, now.experts).any(1).repeat(self.ranks // self.nodes, 0)
            new_RE = _held(now) & ~had_RE
            bytes_R2[:, 0] += (new_RE & had_NE).sum(1) * float(size)
            bytes_R2[:, 1] += (new_RE & ~had_NE).sum(1) * float(size)
        worst = bytes_R2[np.argmax(bytes_R2.sum(1))]
        return Copies(*map(float, worst)), Copies(*map(float, bytes_R2.sum(0)))


def _held(layer: LayerPlacement) -> Array:
    """Which rank holds which expert, (R, E)."""
    held_RE = np.zeros((len(layer.expert_RS), layer.experts + 1), bool)
    held_RE[np.arange(len(held_RE))[:, None], layer.expert_RS] = True  # -1 is the column that goes
    return held_RE[:, :-1]


def contiguous(experts: Sequence[int], ranks: int, nodes: int = 1) -> Placement:
    """Experts of each layer in order, as many on each rank as on the next, or one fewer: what there is before.

    Raises:
        ConfigError: as of `place`.
    """
    _check(ranks, nodes, min(experts, default=0))
    layers = []
    for count in experts:
        parts = np.array_split(np.arange(count), ranks)
        rows = [np.pad(part, (0, len(parts[0]) - len(part)), constant_values=-1) for part in parts]
        layers.append(LayerPlacement(expert_RS=np.stack(rows), experts=count))
    return Placement(layers=tuple(layers), ranks=ranks, nodes=nodes, mode="contiguous")


def _check(ranks: int, nodes: int, experts: int) -> None:
    require(ranks >= 1 and nodes >= 1, f"{ranks} ranks on {nodes} nodes; there must be at least 1 of each")
    require(ranks % nodes == 0, f"{ranks} ranks on {nodes} nodes", "nodes must divide ranks evenly")
    require(
        experts >= ranks, f"{experts} experts on {ranks} ranks", "a rank without one only waits: fewer ranks"
    )


def place(
    loads: Sequence[Array],
    *,
    ranks: int,
    nodes: int = 1,
    redundant: int = 0,
    groups: int = 1,
    mode: Mode = "auto",
) -> Placement:
    """Experts and copies of busy ones, packed so that ranks have equal work.

    Args:
        loads: Of each layer the pairs of each expert, (E). A layer without any is taken for uniform.
        ranks: That hold them.
        nodes: That these are on.
        redundant: Slots of each layer beyond one for each expert.
        groups: Of experts, for routing that is limited to some of them; in order and of equal size.
        mode: See above; auto is hierarchical where there are several nodes which divide the groups.

    Raises:
        ConfigError: slots that ranks do not share evenly, nodes that do not divide ranks, fewer slots than experts,
            more copies than ranks can hold, or hierarchical where nodes do not divide groups.
    """
    require(mode in MODES, f"mode is {mode!r}; allowed are {', '.join(MODES)}")
    _check(ranks, nodes, min((len(load_E) for load_E in loads), default=0))
    fits = groups % nodes == 0
    require(
        mode != "hierarchical" or fits,
        f"hierarchical packs whole groups into nodes: {groups} groups, {nodes} nodes",
        "nodes must divide groups; mode global needs no groups",
    )
    chosen = "hierarchical" if mode == "hierarchical" or (mode == "auto" and fits and nodes > 1) else "global"
    layers = []
    for load_E in loads:
        experts = len(load_E)
        _check_slots(experts, ranks, redundant)
        require(
            experts % groups == 0, f"{experts} experts in {groups} groups", "groups must be of equal size"
        )
        load = np.asarray(load_E, np.float64)
        require(bool(np.isfinite(load).all() and (load >= 0).all()), "loads must be finite and not negative")
        load = load if load.any() else np.ones(experts)
        each = (nodes, groups) if chosen == "hierarchical" else (1, 1)
        layers.append(_placed(load, ranks, redundant, *each))
    return Placement(layers=tuple(layers), ranks=ranks, nodes=nodes, mode=chosen)


def _check_slots(experts: int, ranks: int, redundant: int) -> None:
    require(
        redundant >= 0,
        f"redundant is {redundant}: {experts + redundant} slots for {experts} experts are fewer than experts",
    )
    least = -experts % ranks
    require(
        (experts + redundant) % ranks == 0,
        f"{experts} experts and {redundant} redundant slots are not shared evenly by {ranks} ranks",
        f"redundant {least} or {least + ranks} for instance",
    )
    most = experts * (ranks - 1)
    require(redundant <= most, f"redundant is {redundant}", f"with {most} every rank has every expert")


def _placed(load_E: Array, ranks: int, redundant: int, nodes: int, groups: int) -> LayerPlacement:
    """One layer: groups into nodes, copies, copies into ranks; one node and one group is `global`."""
    experts, per_node = len(load_E), ranks // nodes
    node_G = _pack(load_E.reshape(groups, -1).sum(1), np.arange(groups), nodes)
    expert_RS = np.empty((ranks, (experts + redundant) // ranks), np.int64)
    for node in range(nodes):
        mine = np.flatnonzero(np.repeat(node_G == node, experts // groups))
        replicas = _replicate(load_E[mine], redundant // nodes, per_node)
        expert_N = np.repeat(mine, replicas)
        rank_N = _pack(np.repeat(load_E[mine] / replicas, replicas), expert_N, per_node)
        order_N = np.lexsort((expert_N, rank_N))
        expert_RS[node * per_node : (node + 1) * per_node] = expert_N[order_N].reshape(per_node, -1)
    return LayerPlacement(expert_RS=expert_RS, experts=experts)


def _replicate(load_E: Array, more: int, most: int) -> Array:
    """Copies of each expert: one, and so many more where a copy has the most load, of no expert more than `most`."""
    replicas = np.ones(len(load_E), np.int64)
    for _ in range(more):
        open_E = replicas < most
        heaviest = (load_E / replicas)[open_E].max()
        ties = np.flatnonzero(open_E & (load_E / replicas == heaviest))
        replicas[ties[np.argmin(replicas[ties])]] += 1
    return replicas


def _pack(weight_N: Array, kind_N: Array, bins: int) -> Array:
    """The bin of each item: equally many in each, no two of a kind, the heaviest first into the lightest bin."""
    room = np.full(bins, len(weight_N) // bins)
    load, bin_N = np.zeros(bins), np.empty(len(weight_N), np.int64)
    held: list[set[int]] = [set() for _ in range(bins)]
    for item in np.lexsort((kind_N, -weight_N)).tolist():
        kind = int(kind_N[item])
        has = np.array([kind in one for one in held])
        free = (room > 0) & ~has
        allowed = free if free.any() else room > 0
        chosen = int(np.argmin(np.where(allowed, load, np.inf)))
        bin_N[item] = chosen
        held[chosen].add(kind)
        load[chosen] += weight_N[item]
        room[chosen] -= 1
    _part_twins(weight_N, kind_N, bin_N, bins)
    return bin_N


def _part_twins(weight_N: Array, kind_N: Array, bin_N: Array, bins: int) -> None:
    """Swap items until no bin has two of a kind: the last ones placed may have found no other room.

    A bin without that kind gives the item nearest in weight of a kind that the first bin lacks. If it has none, its
    items are of fewer kinds than it has items, and it gives one of a kind that it has twice. Every swap leaves fewer.
    """
    twins = _twins(kind_N, bin_N)
    while twins is not None:
        kind, full = twins
        mine = int(np.flatnonzero((kind_N == kind) & (bin_N == full))[0])
        had = set(kind_N[bin_N == full].tolist())
        options = []
        for other in set(range(bins)) - set(bin_N[kind_N == kind].tolist()):
            there = np.flatnonzero(bin_N == other).tolist()
            kinds = kind_N[there].tolist()
            give = [one for one in there if kind_N[one] not in had]
            give = give or [one for one in there if kinds.count(kind_N[one]) > 1]
            options += [(abs(float(weight_N[one] - weight_N[mine])), one) for one in give]
        theirs = min(options)[1]
        bin_N[mine], bin_N[theirs] = bin_N[theirs], bin_N[mine]
        twins = _twins(kind_N, bin_N)


def _twins(kind_N: Array, bin_N: Array) -> tuple[int, int] | None:
    """A kind and a bin that has it twice."""
    pairs, counts = np.unique(np.stack([kind_N, bin_N]), axis=1, return_counts=True)
    found = np.flatnonzero(counts > 1)
    return (int(pairs[0, found[0]]), int(pairs[1, found[0]])) if len(found) else None


class Reach(NamedTuple):
    """What a token's choices come to, the mean over tokens and the sum over layers."""

    pairs: float
    ranks: float
    nodes: float


def reached(trace: RoutingTrace, placement: Placement, *, node_limit: int = 0) -> Reach:
    """Over how many ranks and nodes the recorded tokens were spread, by the copies that a placement has of experts.

    A token takes an expert's copies in turn. Of a long trace the first tokens count.

    Args:
        trace: With choices.
        placement: Of the layers that the trace has.
        node_limit: As if no token went to more nodes than that, its experts being in those; 0 is as recorded.

    Raises:
        ConfigError: other layers than the trace has.
        FormatError, StorageError: as of `RoutingTrace.chunks`.
    """
    header = trace.header
    require(
        [layer.experts for layer in placement.layers] == _real(header.experts, header.null_experts),
        f"a placement of {len(placement.layers)} layers, a trace of {len(header.layers)} with other experts",
    )
    per_node, total, tokens = placement.ranks // placement.nodes, np.zeros(3), 0
    for chunk in trace.chunks():
        assert chunk.expert_TLK is not None, header.level
        expert_TLK = chunk.expert_TLK[: MOST_TOKENS - tokens].astype(np.int64)
        for layer, each in enumerate(placement.layers):
            rank_TK = _ranks(each, expert_TLK[:, layer], tokens)
            nodes_T = _different(np.where(rank_TK < 0, -1, rank_TK // per_node))
            nodes_T = np.minimum(nodes_T, node_limit) if node_limit else nodes_T
            total += ((rank_TK >= 0).sum(), _different(rank_TK).sum(), nodes_T.sum())
        tokens += len(expert_TLK)
        if tokens >= MOST_TOKENS:
            break
    return Reach(*(total / max(tokens, 1)).tolist())


def _ranks(layer: LayerPlacement, expert_TK: Array, first: int) -> Array:
    """The rank that each choice goes to; -1 where there is none, or an expert that multiplies nothing."""
    is_real_TK = expert_TK < layer.experts
    safe_TK = np.where(is_real_TK, expert_TK, 0)
    turn_TK = (first + np.arange(len(expert_TK)))[:, None] % layer.replicas_E[safe_TK]
    return np.where(is_real_TK, layer.rank_EC[safe_TK, turn_TK], -1)


def _different(number_TK: Array) -> Array:
    """How many different numbers each row has, those below 0 left out, (T)."""
    sorted_TK = np.sort(number_TK, axis=1)
    new_TK = np.diff(sorted_TK, axis=1, prepend=-1) > 0
    return np.asarray(new_TK.sum(1))


def _real(experts: Sequence[int], null_experts: int) -> list[int]:
    return [count - null_experts for count in experts]


def trace_loads(trace: RoutingTrace) -> tuple[list[Array], list[Array]]:
    """Pairs of each expert of each layer in the first half of a trace and in the second, experts that multiply nothing
    left out. Of a trace that cannot be divided both are the whole.

    Raises:
        FormatError, StorageError: as of `RoutingTrace.chunks`.
    """
    header, done = trace.header, 0
    halves = np.zeros((2, len(header.layers), max(header.experts)), np.int64)
    for chunk in trace.chunks():
        for part, tokens in _parts(chunk, header.tokens // 2 - done):
            halves[int(done >= header.tokens // 2)] += part.counts(header)
            done += tokens
    if not halves.any((1, 2)).all():
        halves[:] = halves.sum(0)
    real = _real(header.experts, header.null_experts)
    first, second = ([half[layer, :count] for layer, count in enumerate(real)] for half in halves)
    return first, second


def _parts(chunk: Chunk, left: int) -> Iterator[tuple[Chunk, int]]:
    """A chunk in two where so many tokens are over, steps of counts being whole; and the tokens of each part."""
    from moiety.tracefile import Chunk

    stop_S = np.cumsum(chunk.tokens_S, dtype=np.int64)
    if chunk.counts_SLE is not None:
        cut = int((stop_S <= left).sum())
        for part in (slice(cut), slice(cut, None)):
            tokens_S = chunk.tokens_S[part]
            yield Chunk(tokens_S=tokens_S, counts_SLE=chunk.counts_SLE[part]), int(tokens_S.sum())
        return
    assert chunk.expert_TLK is not None
    cut = min(max(left, 0), len(chunk.expert_TLK))
    for expert_TLK in (chunk.expert_TLK[:cut], chunk.expert_TLK[cut:]):
        yield Chunk(tokens_S=np.array([len(expert_TLK)]), expert_TLK=expert_TLK), len(expert_TLK)

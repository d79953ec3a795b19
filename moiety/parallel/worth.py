"""Whether it pays to place experts anew: what each way of holding them balances, sends, keeps and costs to reach. No
torch.

Compared are experts in order, a balanced placement, and with several nodes all experts in every node (expert
parallelism inside a node, data parallelism across). A placement is made for the first half of a trace and judged by the
second half. Seconds are those of the layers' routed experts alone, for a prompt or a forward pass: multiplying, at the
busiest rank's load and the share of arithmetic that programs reach, and all-to-alls, as of `plan.links`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moiety import cost
from moiety.config import ModelConfig
from moiety.errors import ConfigError
from moiety.parallel.placement import Mode, Placement, contiguous, place, reached, trace_loads
from moiety.plan.hardware import KINDS, Band
from moiety.plan.links import ONCE, Cluster, Copies, Once, exchange, leaving, sent
from moiety.plan.search import short_bytes
from moiety.tracefile import RoutingTrace

__all__ = ["AS_IT_IS", "BALANCED", "IN_NODES", "Comparison", "Way", "compare"]

AS_IT_IS, BALANCED, IN_NODES = "in order", "balanced", "all in every node"
PAYS = 0.05  # of the time: less is within what the model of it leaves out
TOKENS = 1e6
PIECE_TOKENS = 4096  # of a rank in one all-to-all
ROW_BYTES = 2  # bfloat16
Loads = Sequence[npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """One way to hold experts.

    Args:
        name: In words.
        placement: Who holds what, over all ranks.
        imbalance: Load of the busiest rank over the mean, of a step that waits for it in every layer.
        layer_imbalance: Of each layer by itself.
        token_bytes: That a token sends and gets back over links, in all layers, by how often a row is sent.
        limited_bytes: The same once per node if no token went to more nodes than the limit; None without one.
        rank_bytes: Of experts, in the rank with most.
        moved: Bytes of experts that come to their rank from its node and from others, all ranks together.
        move_seconds: Until the rank with most has them.
        seconds: For a million tokens.
        repaid_tokens: After which moving has paid; None if it never has.
    """

    name: str
    placement: Placement
    imbalance: float
    layer_imbalance: tuple[float, ...]
    token_bytes: Mapping[Once, Copies]
    limited_bytes: Copies | None
    rank_bytes: float
    moved: Copies
    move_seconds: Band
    seconds: Band
    repaid_tokens: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What `compare` found.

    Args:
        layers: Numbers of the blocks with experts.
        ways: The one that is there first of all.
        advice: What pays, in a sentence or two.
        notes: What was assumed or left out.
    """

    layers: tuple[int, ...]
    ways: tuple[Way, ...]
    advice: str
    notes: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """All of it as plain values."""
        ways = []
        for way in self.ways:
            plain = {name: value for name, value in vars(way).items() if name != "placement"}
            plain["token_bytes"] = {once: size._asdict() for once, size in way.token_bytes.items()}
            for name in ("limited_bytes", "moved", "move_seconds", "seconds"):
                plain[name] = None if plain[name] is None else plain[name]._asdict()
            layers = [layer.expert_RS.tolist() for layer in way.placement.layers]
            ways.append(plain | {"mode": way.placement.mode, "expert_of_slot": layers})
        return {"advice": self.advice, "notes": list(self.notes), "layers": list(self.layers), "ways": ways}


def compare(
    config: ModelConfig,
    cluster: Cluster,
    expert_bytes: Sequence[float],
    *,
    trace: RoutingTrace | None = None,
    redundant: int = 0,
    mode: Mode = "auto",
    node_limit: int = 0,
) -> Comparison:
    """Ways to hold a model's experts on a cluster.

    Args:
        config: The model's.
        cluster: Ranks, nodes and their links.
        expert_bytes: Of one expert of each layer with experts.
        trace: Of this model; None takes routing for uniform.
        redundant: As of `place`.
        mode: As of `place`.
        node_limit: As of `reached`.

    Raises:
        ConfigError: a dense model, a trace of another one, or as of `place`.
        FormatError, StorageError: as of `RoutingTrace.chunks`.
    """
    experts = _experts(config)
    notes: list[str] = []
    if trace is None:
        loads: tuple[Loads, Loads] = ([np.ones(count) for count in experts],) * 2
        notes.append("loads are taken for uniform: --trace has recorded ones")
    else:
        loads = _recorded(trace, experts, notes)
    ranks, nodes = cluster.ranks, cluster.nodes
    groups = config.moe.groups if config.moe is not None else 1
    before = contiguous(experts, ranks, nodes)
    balanced = place(loads[0], ranks=ranks, nodes=nodes, redundant=redundant, groups=groups, mode=mode)
    if not redundant and before.imbalance(loads[0]) <= balanced.imbalance(loads[0]) * (1 + 1e-9):
        balanced = before  # of equals the one that moves nothing
    found = {AS_IT_IS: before, BALANCED: balanced}
    if nodes > 1:
        most = min(experts) * (cluster.per_node - 1)
        found[IN_NODES] = _tiled(
            place(loads[0], ranks=cluster.per_node, redundant=min(redundant, most)), nodes
        )
    counted = trace if trace is not None and trace.header.level != "counts" else None
    if trace is not None and counted is None:
        notes.append("the trace holds counts alone: rows are counted as if routing were uniform")
    if node_limit and counted is None:
        notes.append("node_limit is left out: it wants a trace of choices")
    ways: list[Way] = []
    for name, placement in found.items():
        reach = _reach(config, cluster, name, placement, counted, node_limit)
        way = _way(config, cluster, name, placement, before, loads[1], expert_bytes, reach)
        ways.append(_repaid(way, ways[0]) if ways else way)
    return Comparison(
        layers=tuple(config.moe_layers),
        ways=tuple(ways),
        advice=_advice(cluster, ways, trace is None),
        notes=tuple(notes),
    )


def _experts(config: ModelConfig) -> list[int]:
    if config.moe is None:
        raise ConfigError("this model is dense: it has no experts to place", hint="a Mixture of Experts")
    return [config.moe.at(layer).stored for layer in config.moe_layers]


def _recorded(trace: RoutingTrace, experts: Sequence[int], notes: list[str]) -> tuple[Loads, Loads]:
    header = trace.header
    real = [count - header.null_experts for count in header.experts]
    if real != list(experts):
        raise ConfigError(
            f"the trace has {len(real)} layers of {min(real)} to {max(real)} experts, the model {len(experts)} of "
            f"{min(experts)} to {max(experts)}",
            hint="record the trace with this model",
        )
    first, second = trace_loads(trace)
    same = all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    judged = "the same tokens, which flatters it" if same else "the second half"
    notes.append(f"placed for the first half of {header.tokens:,} recorded tokens, judged by {judged}")
    return first, second


def _tiled(one: Placement, nodes: int) -> Placement:
    """The same in every node."""
    layers = [replace(layer, expert_RS=np.tile(layer.expert_RS, (nodes, 1))) for layer in one.layers]
    return Placement(layers=tuple(layers), ranks=one.ranks * nodes, nodes=nodes, mode=one.mode)


def _reach(
    config: ModelConfig,
    cluster: Cluster,
    name: str,
    placement: Placement,
    trace: RoutingTrace | None,
    node_limit: int,
) -> tuple[dict[Once, Copies], Copies | None]:
    """Rows that leave their rank for a token, by how often they are sent; and within the limit."""
    limited = None
    if name == IN_NODES:
        cluster = cluster.one_node
        layers = [replace(layer, expert_RS=layer.expert_RS[: cluster.ranks]) for layer in placement.layers]
        placement = Placement(layers=tuple(layers), ranks=cluster.ranks, nodes=1, mode=placement.mode)
    if trace is None:
        return {once: sent(config, cluster, once) for once in ONCE}, None
    spread = reached(trace, placement)
    if node_limit:
        limited = leaving(*reached(trace, placement, node_limit=node_limit), cluster, "node")
    return {once: leaving(*spread, cluster, once) for once in ONCE}, limited


def _way(
    config: ModelConfig,
    cluster: Cluster,
    name: str,
    placement: Placement,
    before: Placement,
    loads: Loads,
    expert_bytes: Sequence[float],
    rows: tuple[dict[Once, Copies], Copies | None],
) -> Way:
    imbalance = placement.imbalance(loads)
    both_ways = 2 * ROW_BYTES * config.d_model
    token_bytes = {once: one.times(both_ways) for once, one in rows[0].items()}
    worst, moved = placement.moved(before, expert_bytes)
    kind, mine = KINDS[cluster.device.kind], TOKENS / cluster.ranks
    flops = mine * cost.flops_per_token(config).components["routed_experts"] * imbalance
    multiplying = [
        flops / cluster.device.flops["bf16"] / share for share in (kind.prefill.high, kind.prefill.low)
    ]
    rounds = 2 * len(placement.layers) * max(mine / PIECE_TOKENS, 1)
    waiting = exchange(cluster, token_bytes["node"].times(mine * imbalance), rounds)
    return Way(
        name=name,
        placement=placement,
        imbalance=imbalance,
        layer_imbalance=tuple(
            layer.imbalance(load_E) for layer, load_E in zip(placement.layers, loads, strict=True)
        ),
        token_bytes=token_bytes,
        limited_bytes=None if rows[1] is None else rows[1].times(both_ways),
        rank_bytes=float(placement.rank_bytes(expert_bytes).max()),
        moved=moved,
        move_seconds=exchange(cluster, worst) if any(worst) else Band(0.0, 0.0),
        seconds=Band(max(multiplying[0], waiting.low), multiplying[1] + waiting.high),
    )


def _repaid(way: Way, before: Way) -> Way:
    saved = before.seconds.middle - way.seconds.middle
    return replace(way, repaid_tokens=TOKENS * way.move_seconds.middle / saved if saved > 0 else None)


def _advice(cluster: Cluster, ways: Sequence[Way], uniform: bool) -> str:
    """What pays, with the figures that say so."""
    before, balanced = ways[0], ways[1]
    parts = []
    gain = 1 - balanced.seconds.middle / before.seconds.middle
    figures = (
        f"the busiest rank has {before.imbalance:.2f} times the mean load in order and {balanced.imbalance:.2f} times "
        f"balanced, which takes {abs(gain):.1%} {'less' if gain >= 0 else 'more'} time in the experts' layers and "
        f"{short_bytes(balanced.rank_bytes)} a rank for {short_bytes(before.rank_bytes)}"
    )
    if uniform:
        parts.append(f"nothing says that a placement pays, as loads are unknown: {figures}")
    elif gain < PAYS or balanced.repaid_tokens is None:
        parts.append(f"placing experts anew does not pay: {figures}")
    else:
        parts.append(
            f"placing experts anew pays: {figures}; moving {short_bytes(sum(balanced.moved))} takes "
            f"{balanced.move_seconds.middle:.2g} s, repaid after {balanced.repaid_tokens:,.0f} tokens"
        )
    if len(ways) > 2:
        parts.append(_nodes_advice(cluster, ways[2], min(ways[:2], key=lambda way: way.seconds.middle)))
    return "; ".join(parts)


def _nodes_advice(cluster: Cluster, inside: Way, best: Way) -> str:
    device = cluster.device
    room = KINDS[device.kind].usable * device.memory_bytes
    gain = 1 - inside.seconds.middle / best.seconds.middle
    size = f"{short_bytes(inside.rank_bytes)} of experts a rank for {short_bytes(best.rank_bytes)}"
    if inside.rank_bytes > room:
        return f"all experts in every node are {size}: more than the {short_bytes(room)} of a {device.name}"
    if gain < PAYS:
        return f"all experts in every node are {size} and save {gain:.1%}: they do not pay"
    return (
        f"all experts in every node send nothing between nodes and save {gain:.1%} more, for {size}; while training "
        "their gradients are summed over nodes in every step"
    )

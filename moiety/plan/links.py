"""How long ranks wait for one another: a latency, and bytes over a rate, inside a node and between nodes. No torch.

An all-to-all takes as long as its busiest rank: latency + bytes / rate on each kind of link. The lower end of a band
has both kinds at work side by side, the upper end one after the other. What `fit` finds on this machine and what the
table of devices says go through the same formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moiety.config import ModelConfig, MoEConfig, require
from moiety.plan.hardware import Band, Device

__all__ = [
    "EXCHANGE",
    "LATENCY_BETWEEN",
    "ONCE",
    "REACHED_BETWEEN",
    "REACHED_INSIDE",
    "Cluster",
    "Copies",
    "Link",
    "Once",
    "Sample",
    "exchange",
    "fit",
    "leaving",
    "sent",
]

# A row goes out for each of a token's experts, once to each rank that has one of them, or once to each node and from
# there to its ranks, as our own expert parallelism sends it.
Once = Literal["pair", "rank", "node"]
ONCE: tuple[Once, ...] = ("pair", "rank", "node")
# Seconds until a small result has reached all devices of a host and is summed; assumed.
EXCHANGE = Band(5e-6, 30e-6)
# The same between hosts: what DeepEP's low-latency kernels take on 256 ranks (194 us out, 360 us back) less their bytes
# at 50 GB/s (147 and 294 us).
LATENCY_BETWEEN = Band(47e-6, 66e-6)
# Of a link's published rate. The upper ends: DeepEP on H800, 153 to 158 of 200 GB/s inside a host and 57 GB/s between
# four of them, a quarter of which never leaves its host, of 50. The lower ends are assumed.
REACHED_INSIDE = Band(0.5, 0.79)
REACHED_BETWEEN = Band(0.5, 0.86)


class Link(NamedTuple):
    """What a message costs: seconds before its first byte, and bytes per second."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float, messages: float = 1) -> float:
        """Of so many messages with so many bytes together."""
        return messages * self.latency_s + size_bytes / self.bytes_per_s


class Sample(NamedTuple):
    """A measured exchange."""

    messages: float
    size_bytes: float
    seconds: float


class Copies(NamedTuple):
    """What leaves its rank, rows or bytes: to others of its node, and to other nodes."""

    inside: float
    between: float

    def times(self, factor: float) -> Copies:
        """Both, scaled."""
        return Copies(factor * self.inside, factor * self.between)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks over which experts are spread; `ranks / nodes` neighbours share a node.

    Raises:
        ConfigError: fewer than one, or nodes that do not divide the ranks.
    """

    device: Device
    ranks: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        require(self.ranks >= 1 and self.nodes >= 1, f"{self.ranks} ranks on {self.nodes} nodes; at least 1")
        require(
            self.ranks % self.nodes == 0,
            f"{self.ranks} ranks on {self.nodes} nodes: the nodes do not divide the ranks evenly",
            f"every node has as many ranks: {self.nodes * math.ceil(self.ranks / self.nodes)} ranks for instance",
        )

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.ranks // self.nodes

    @property
    def one_node(self) -> Cluster:
        """A node by itself: what it exchanges stays in it."""
        return Cluster(device=self.device, ranks=self.per_node)

    def links(self, *, fast: bool) -> tuple[Link, Link]:
        """Inside a node and between nodes, at the better or the worse end of what is expected."""
        end = "high" if fast else "low"
        late = "low" if fast else "high"
        return (
            Link(getattr(EXCHANGE, late), getattr(REACHED_INSIDE, end) * self.device.link),
            Link(getattr(LATENCY_BETWEEN, late), getattr(REACHED_BETWEEN, end) * self.device.network),
        )


def fit(samples: Sequence[Sample]) -> Link:
    """The link that explains measured exchanges best: the least sum of squared relative errors, nothing negative.

    Raises:
        ConfigError: fewer than two samples, or all of one size.
    """
    require(
        len({one.size_bytes / one.messages for one in samples}) >= 2,
        f"{len(samples)} samples of {len({one.size_bytes for one in samples})} sizes",
        "a latency and a rate want exchanges of at least two sizes",
    )
    rows = [(one.messages / one.seconds, one.size_bytes / one.seconds) for one in samples]
    aa, ab, bb = (sum(x * y for x, y in pairs) for pairs in _products(rows))
    a, b = (sum(column) for column in zip(*rows, strict=True))
    determinant = aa * bb - ab * ab
    latency, each = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if latency < 0:
        latency, each = 0.0, b / bb
    elif each <= 0:
        latency, each = a / aa, 1e-18
    return Link(latency, 1 / each)


def _products(rows: Sequence[tuple[float, float]]) -> tuple[Sequence[tuple[float, float]], ...]:
    return [(x, x) for x, _ in rows], rows, [(y, y) for _, y in rows]


def _none_of(choices: int, of: float, part: float) -> float:
    """Chance that none of so many different ones, drawn of `of`, is among `part` of them."""
    return math.prod(max(of - part - one, 0.0) / (of - one) for one in range(choices)) if part else 1.0


def _hit(moe: MoEConfig, parts: int) -> float:
    """How many of so many equal parts of the experts a token reaches if routing is uniform, within its groups.

    A group is inside one part, or a part inside one group, as experts lie in order; else groups are left out.
    """
    experts, chosen = moe.experts, moe.experts_per_token
    groups, kept = (moe.groups, moe.groups_kept) if moe.groups > 1 else (1, 1)
    open_to = experts * kept / groups
    if groups % parts == 0:
        each, total = groups // parts, 0.0
        for mine in range(min(each, kept) + 1):
            ways = math.comb(each, mine) * math.comb(groups - each, kept - mine) / math.comb(groups, kept)
            total += ways * (1 - _none_of(chosen, open_to, mine * experts / groups))
        return parts * total
    if parts % groups == 0:
        return parts * kept / groups * (1 - _none_of(chosen, open_to, experts / parts))
    return parts * (1 - _none_of(chosen, experts, experts / parts))


def sent(config: ModelConfig, cluster: Cluster, once: Once = "node") -> Copies:
    """Rows that leave their rank for a token on its way out, summed over layers; as many come back.

    Routing is uniform (within groups) and experts lie in order. A dense model sends nothing.
    """
    total = Copies(0.0, 0.0)
    for layer in config.moe_layers if config.moe is not None else ():
        assert config.moe is not None
        moe = config.moe.at(layer)
        rows = leaving(
            moe.experts_per_token, _hit(moe, cluster.ranks), _hit(moe, cluster.nodes), cluster, once
        )
        total = Copies(total.inside + rows.inside, total.between + rows.between)
    return total


def leaving(pairs: float, ranks: float, nodes: float, cluster: Cluster, once: Once) -> Copies:
    """Rows that leave their rank, of tokens that have so many experts on so many ranks on so many nodes, the mean.

    A token's own rank is any of the cluster, and so is the rank of a node that passes a row on.
    """
    if once == "node":
        return Copies(ranks * (1 - 1 / cluster.per_node), nodes * (1 - 1 / cluster.nodes))
    rows = pairs if once == "pair" else ranks
    return Copies(rows * (1 / cluster.nodes - 1 / cluster.ranks), rows * (1 - 1 / cluster.nodes))


def exchange(cluster: Cluster, rank_bytes: Copies, exchanges: float = 1) -> Band:
    """Seconds of all-to-alls in which the busiest rank sends so many bytes altogether."""
    ends = []
    for fast in (True, False):
        inside, between = (
            link.seconds(size, exchanges) if size else 0.0
            for link, size in zip(cluster.links(fast=fast), rank_bytes, strict=True)
        )
        ends.append(max(inside, between) if fast else inside + between)
    return Band(*ends)

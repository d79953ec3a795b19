"""A recorded run against caches that it did not have: which experts would have been in memory, and how fast that is.

The replay asks the very class that streaming asks (`moiety.residency`), step by step, so that a hit rate here is that
of a run that decodes the same tokens. Prompts are left out: a run reads their experts in waves, once for all tokens.
A trace of texts alone, without answers, is replayed as if its tokens had been drawn one after the other. The first use
of an expert, which no cache has, is not counted: in a long run it weighs nothing.

Time of a step: missed bytes over the disk's rate and touched bytes over the memory's, side by side (the faster end of
the band) or one after the other. What else a step does is left out, so both are limits and not promises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul, sub
from typing import TYPE_CHECKING, NamedTuple

from moiety.errors import ConfigError, UsageError
from moiety.fields import check_types, option, require
from moiety.residency import POLICIES, Residency, belady

if TYPE_CHECKING:
    from moiety.tracefile import RoutingTrace, Step, TraceHeader

__all__ = ["BELADY", "ENOUGH", "MOST_USES", "SHARES", "Point", "Rates", "Replay", "ReplayOptions", "replay"]

BELADY = "belady"
ENOUGH = 0.9  # of the speed, or of the hits, that everything in memory gives
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
MOST_USES = 16_000_000  # of experts in all replays together: less than a minute
FEWEST_TOKENS = 64
Limits = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What to replay a trace with."""

    trace: str = option("", help="replay this file, which --record wrote, with less memory than it had")
    policies: str = option("", help=f"of {', '.join((*POLICIES, BELADY))}; commas between; '' is all")
    budgets: str = option("", help="for experts: 25%,50% of them, or 4GiB,8GiB; '' is a curve")

    def __post_init__(self) -> None:
        check_types(self)
        require(
            bool(self.trace) or not (self.policies or self.budgets),
            "there are policies or budgets, and no trace to replay",
            "add --trace FILE",
        )
        require(
            all(share > 0 for share in self.wanted_shares), f"budgets are {self.budgets!r}", "all above 0"
        )

    @property
    def wanted_policies(self) -> tuple[str, ...]:
        """Names, in the order given."""
        return _words(self.policies) or (*POLICIES, BELADY)

    @property
    def wanted_shares(self) -> tuple[float, ...]:
        """Budgets that end in %."""
        words = [word[:-1].strip() for word in _words(self.budgets) if word.endswith("%")]
        try:
            return tuple(float(word) / 100 for word in words)
        except ValueError:
            raise ConfigError(f"budgets are {self.budgets!r}", hint="25%,50% or 4GiB,8GiB") from None

    @property
    def wanted_sizes(self) -> tuple[str, ...]:
        """The others, as texts with units."""
        return tuple(word for word in _words(self.budgets) if not word.endswith("%"))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


class Rates(NamedTuple):
    """Bytes per second, the least and the most: of the disk at reads of one expert, and of memory."""

    disk: Limits
    memory: Limits


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy with one budget.

    Args:
        policy: Its name; "belady" knows the future, and no run can be better.
        slots: Experts that fit.
        share: Of all experts.
        size_bytes: Of the slots; None where the size of an expert is unknown.
        hit_rate: Of the experts that steps wanted again, those that were there.
        missed_bytes: That a token waits for, the mean; None as above.
        tokens_per_s: Band; None where sizes or rates are unknown.
        limit: What takes longer, "disk" or "memory"; "" as above.
    """

    policy: str
    slots: int
    share: float
    size_bytes: int | None
    hit_rate: float
    missed_bytes: float | None
    tokens_per_s: Limits | None
    limit: str


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A hit curve.

    Args:
        points: By policy, the smaller budget first.
        tokens: That were replayed.
        of_tokens: That the trace holds.
        uses: Of experts in one replay; a step counts each expert of a layer once.
        first_uses: Of these, the first of each expert, which is neither a hit nor a miss.
        cycle: Experts that one step goes through, the mean; below so many slots recency finds next to nothing.
        cycle_bytes: Of these; None where the size of an expert is unknown.
        knee: The smallest budget that does as well as 90 % of everything in memory; None if none does.
        advice: The same in one sentence.
        notes: What was left out or assumed.
    """

    points: tuple[Point, ...]
    tokens: int
    of_tokens: int
    uses: int
    first_uses: int
    cycle: float
    cycle_bytes: float | None
    knee: Point | None
    advice: str
    notes: tuple[str, ...]


class _Run(NamedTuple):
    """What is replayed: steps, and bytes where they are known."""

    steps: list[Step]
    tokens: int
    experts: tuple[int, ...]
    bytes_L: tuple[float, ...]
    dense_bytes: float
    wanted_L: list[int]
    first_L: list[int]

    @property
    def touched_bytes(self) -> float:
        """That a step reads from memory, the mean."""
        return self.dense_bytes + math.fsum(map(mul, self.bytes_L, self.wanted_L)) / len(self.steps)


def replay(
    trace: RoutingTrace,
    *,
    policies: Sequence[str] = (*POLICIES, BELADY),
    shares: Sequence[float] = SHARES,
    budgets: Sequence[int] = (),
    rates: Rates | None = None,
    expert_bytes: Sequence[float] = (),
    dense_bytes: float = 0,
    most_uses: int = MOST_USES,
) -> Replay:
    """Replay a trace with every policy and every budget.

    Args:
        trace: At level choices or scores.
        policies: Names of `moiety.residency.POLICIES`, or "belady".
        shares: Budgets as shares of all experts.
        budgets: Bytes for experts instead, where sizes are known.
        rates: Rates, for tokens per second.
        expert_bytes: Of one expert of each layer, instead of what the trace says.
        dense_bytes: That every step reads besides, instead of what the trace says.
        most_uses: Of experts in all replays together; of a longer trace the first tokens are taken, and it is said.

    Raises:
        UsageError: nothing to replay, no such policy, or budgets in bytes of a trace without sizes.
        ConfigError: a share that is none.
        FormatError, StorageError: as of `RoutingTrace.chunks`.
    """
    if not policies or not {*policies} <= {*POLICIES, BELADY}:
        raise UsageError(f"policies are {list(policies)}", hint=f"there are {', '.join((*POLICIES, BELADY))}")
    header = trace.header
    sizes = tuple(expert_bytes) or tuple(map(float, header.expert_bytes))
    slots = _slots(header, sizes, shares, budgets)
    everything = slots[-1]
    most_tokens = max(
        most_uses // (len(slots) * len(policies) * max(_uses_of_a_token(trace), 1)), FEWEST_TOKENS
    )
    run, notes = _taken(trace, most_tokens, sizes, dense_bytes or header.dense_bytes)
    points = tuple(
        point
        for policy in policies
        for count in slots
        if (point := _point(run, policy, count, everything, rates)) is not None
    )
    cycle = sum(run.wanted_L) / len(run.steps)
    cycle_bytes = run.touched_bytes - run.dense_bytes if sizes else None
    knee = _knee(points, everything)
    return Replay(
        points=points,
        tokens=run.tokens,
        of_tokens=header.tokens,
        uses=sum(run.wanted_L),
        first_uses=sum(run.first_L),
        cycle=cycle,
        cycle_bytes=cycle_bytes,
        knee=knee,
        advice=_advice(points, knee, cycle, cycle_bytes),
        notes=(*notes, *_remarks(points)),
    )


def _remarks(points: Sequence[Point]) -> list[str]:
    """What to know about the figures."""
    policies = {point.policy for point in points}
    remarks = {
        "fixed keeps the experts that these very tokens use most; a run has to know them before": "fixed"
        in policies,
        "belady knows what comes; no run can do better": BELADY in policies,
        "without the size of an expert and the rates of disk and memory there are no tokens/s": any(
            point.tokens_per_s is None for point in points
        ),
    }
    return [words for words, holds in remarks.items() if holds]


def _slots(
    header: TraceHeader, sizes: Sequence[float], shares: Sequence[float], budgets: Sequence[int]
) -> list[int]:
    """Slots of every budget, ascending, everything in memory the last."""
    real = [count - header.null_experts for count in header.experts]
    if budgets:
        if not sizes:
            raise UsageError(
                "the trace does not say how large an expert is", hint="give shares, or the model"
            )
        shares = [size / sum(map(mul, sizes, real)) for size in budgets]
    require(
        bool(shares) and min(shares) > 0, f"shares are {list(shares)}; each is above 0, and 1 is every expert"
    )
    return sorted({min(max(round(share * sum(real)), 1), sum(real)) for share in shares} | {sum(real)})


def _uses_of_a_token(trace: RoutingTrace) -> int:
    """Experts that the first step's tokens went through, each."""
    for step in trace.steps(apart=True):
        return sum(map(len, step.experts))
    raise UsageError("the trace is empty: there is nothing to replay")


def _taken(
    trace: RoutingTrace, most_tokens: int, sizes: tuple[float, ...], dense_bytes: float
) -> tuple[_Run, list[str]]:
    """The steps that are replayed, and what to say of them."""
    notes, tokens, taken = [], 0, []
    drawn = trace.drawn_tokens()
    apart = drawn < FEWEST_TOKENS
    for step in trace.steps(apart=apart):
        if apart or step.tokens == step.requests:
            if tokens >= most_tokens:
                break
            taken.append(step)
            tokens += step.tokens
    if apart:
        notes.append("the trace holds texts, hardly any answers: each token is taken as a step of its own")
    elif drawn < trace.header.tokens:
        notes.append(f"{trace.header.tokens - drawn:,} tokens of prompts are left out")
    there = trace.header.tokens if apart else drawn
    if tokens < there:
        notes.append(f"the first {tokens:,} of {there:,} tokens are replayed, to answer within a minute")
    for count, why in (
        (trace.header.skipped_tokens, "were skipped by sampling"),
        (trace.header.dropped_tokens, "were dropped at the trace's limit"),
    ):
        if count:
            notes.append(f"{count:,} tokens of the run {why}")
    layers = range(len(trace.header.layers))
    real = tuple(count - trace.header.null_experts for count in trace.header.experts)
    wanted_L = [sum(len(step.experts[layer]) for step in taken) for layer in layers]
    if not any(wanted_L):
        raise UsageError("no token of the trace was sent to an expert: there is nothing to replay")
    first_L = [len({one for step in taken for one in step.experts[layer]}) for layer in layers]
    return _Run(taken, tokens, real, sizes or (0.0,) * len(layers), dense_bytes, wanted_L, first_L), notes


def _point(run: _Run, policy: str, slots: int, everything: int, rates: Rates | None) -> Point | None:
    """One replay; None where the policy needs more slots than these."""
    layers, again_L = len(run.experts), list(map(sub, run.wanted_L, run.first_L))
    mean_bytes = sum(map(mul, run.bytes_L, run.experts)) / everything
    if policy == BELADY:
        calls = [(layer, row) for step in run.steps for layer, row in enumerate(step.experts)]
        misses = belady(calls, slots)[1] - sum(run.first_L)
        missed_bytes = misses * sum(map(mul, run.bytes_L, again_L)) / max(sum(again_L), 1)
    else:
        if slots < _fewest(policy, layers):
            return None
        keep = _most_used(run, slots) if policy == "fixed" else None
        size = max(run.bytes_L) or math.inf
        cache = Residency(slots, policy, layers=layers, keep=keep, slot_bytes=size)
        missed_L = [-first for first in run.first_L]
        for step in run.steps:
            for layer, row in enumerate(step.experts):
                missed_L[layer] += len(cache.use(layer, row).loads)
        misses = sum(missed_L)
        missed_bytes = sum(map(mul, run.bytes_L, missed_L))
    known = any(run.bytes_L)
    speed, limit = _speed(run, missed_bytes / len(run.steps), rates) if known and rates else (None, "")
    return Point(
        policy=policy,
        slots=slots,
        share=slots / everything,
        size_bytes=round(slots * mean_bytes) if known else None,
        hit_rate=1 - misses / max(sum(again_L), 1),
        missed_bytes=missed_bytes / run.tokens if known else None,
        tokens_per_s=speed,
        limit=limit,
    )


def _fewest(policy: str, layers: int) -> int:
    """Slots that a policy needs at least."""
    return layers if POLICIES[policy].divided else 2 if POLICIES[policy].stays else 1


def _most_used(run: _Run, slots: int) -> frozenset[tuple[int, int]]:
    """The experts that the fixed set is made of: those that these steps use most."""
    counts: dict[tuple[int, int], int] = {}
    for step in run.steps:
        for layer, row in enumerate(step.experts):
            for expert in row:
                counts[layer, expert] = counts.get((layer, expert), 0) + 1
    return frozenset(sorted(counts, key=lambda key: (-counts[key], key))[: slots - 1])


def _speed(run: _Run, missed_bytes: float, rates: Rates) -> tuple[Limits, str]:
    """Tokens per second, the least and the most, of steps that miss so many bytes."""
    tokens = run.tokens / len(run.steps)
    slow = missed_bytes / rates.disk[0], run.touched_bytes / rates.memory[0]
    fast = missed_bytes / rates.disk[1], run.touched_bytes / rates.memory[1]
    return (tokens / sum(slow), tokens / max(fast)), "disk" if fast[0] > fast[1] else "memory"


def _value(point: Point) -> float:
    """What a budget is judged by."""
    return point.hit_rate if point.tokens_per_s is None else sum(point.tokens_per_s) / 2


def _knee(points: Sequence[Point], everything: int) -> Point | None:
    """The best policy of the smallest budget that is good enough; everything in memory is no answer."""
    real = [point for point in points if point.policy != BELADY]
    full = [_value(point) for point in real if point.slots == everything]
    good = [one for one in real if full and one.slots < everything and _value(one) >= ENOUGH * max(full)]
    return min(good, key=lambda one: (one.slots, -_value(one)), default=None)


def _advice(points: Sequence[Point], knee: Point | None, cycle: float, cycle_bytes: float | None) -> str:
    """One sentence."""
    real = [point for point in points if point.policy != BELADY]
    if not real:
        return "belady alone is no advice: it is a bound."
    some = [point for point in real if point.share < 1] or real
    best = knee or max(some, key=lambda one: (_value(one), -one.slots))
    size = "" if best.size_bytes is None else f" ({best.size_bytes / 1e9:.3g} GB)"
    speed = ""
    if best.tokens_per_s is not None:
        speed = f" and give {best.tokens_per_s[0]:.3g} to {best.tokens_per_s[1]:.3g} tokens/s, limited by {best.limit}"
    what = "tokens/s" if best.tokens_per_s is not None else "hits"
    judged = (
        f"the smallest budget here with {ENOUGH:.0%} of the {what} of all experts in memory"
        if knee
        else f"no budget here below all experts has {ENOUGH:.0%} of their {what}"
    )
    edge = f"{cycle:.0f} slots" + ("" if cycle_bytes is None else f" ({cycle_bytes / 1e9:.3g} GB)")
    return (
        f"Slots for {best.share:.0%} of the experts{size} under {best.policy} hit {best.hit_rate:.1%}{speed}: "
        f"{judged}; a step goes through {edge}, and below that lru finds next to nothing."
    )

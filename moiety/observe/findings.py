"""What a comparison of runs says: the numbers of a report as plain data, and the sentences they allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moiety.observe.stats import Specialization

__all__ = [
    "Comparison",
    "CorpusDomain",
    "EqualTime",
    "EvaluationPoint",
    "ExpertTokens",
    "Generation",
    "HealthPoint",
    "ReportData",
    "RoutedText",
    "RoutedToken",
    "Run",
    "TrainingPoint",
    "common_domains",
    "compare",
    "domain_sentence",
    "equal_time_sentence",
    "headline",
    "mean_bits",
    "mean_curve",
    "places",
    "short_number",
]

SAME = 0.005  # relative differences below this are called no clear difference
EQUAL = 0.05  # parameters, tokens and times within this are called equal


def compare(data: ReportData) -> Comparison | None:
    """The first MoE run against the first dense run; None unless there are both, with a domain in common."""
    moe = next((run for run in data.runs if run.kind == "moe"), None)
    dense = next((run for run in data.runs if run.kind == "dense"), None)
    if moe is None or dense is None:
        return None
    domains = common_domains((moe, dense))
    if not domains:
        return None
    moe_bits, dense_bits = (
        float(np.mean([run.final_bits_per_byte[d] for d in domains])) for run in (moe, dense)
    )
    tokens = [run.training[-1].tokens if run.training else 0 for run in (moe, dense)]
    seconds = [run.training[-1].seconds if run.training else 0.0 for run in (moe, dense)]
    return Comparison(
        moe=moe,
        dense=dense,
        domains=domains,
        moe_bits=moe_bits,
        dense_bits=dense_bits,
        moe_tokens=tokens[0],
        dense_tokens=tokens[1],
        time_ratio=seconds[0] / seconds[1] if min(seconds) > 0 else None,
        equal_time=_at_equal_time(moe, dense, domains),
    )


def headline(data: ReportData) -> str:
    """What came out, in one sentence; it says so when the dense model wins or nothing can be told."""
    found = compare(data)
    if found is None:
        best = min(data.runs, key=lambda run: mean_bits(run) if run.final_bits_per_byte else math.inf)
        if not best.final_bits_per_byte:
            return f"{best.name} was trained; nothing was evaluated."
        return f"{best.name} reached {mean_bits(best):.2f} bits/byte on held-out text."
    parameters = (
        "equal active parameters"
        if _near(found.moe.parameters_active, found.dense.parameters_active)
        else f"{short_number(found.moe.parameters_active)} active parameters against "
        f"{short_number(found.dense.parameters_active)}"
    )
    tokens = (
        "equal tokens"
        if _near(found.moe_tokens, found.dense_tokens)
        else f"{short_number(found.moe_tokens)} tokens against {short_number(found.dense_tokens)}"
    )
    result = (
        f"At {parameters} and {tokens}, the MoE reached {found.moe_bits:.2f} bits/byte "
        f"against the dense twin's {found.dense_bits:.2f}"
    )
    return f"{result}: {_outcome(found.moe_bits, found.dense_bits)}{_time_clause(found)}."


def equal_time_sentence(data: ReportData) -> str:
    """The same comparison after the same seconds of training; empty where there is no such comparison."""
    found = compare(data)
    if found is None:
        return ""
    if found.equal_time is None:
        return "The evaluations do not allow a comparison after equal training time."
    moe, dense, seconds = found.equal_time.moe_bits, found.equal_time.dense_bits, found.equal_time.seconds
    return (
        f"Given the same {seconds:,.0f} seconds of training instead, it is {moe:.2f} against {dense:.2f}: "
        f"{_outcome(moe, dense)}."
    )


def _outcome(moe_bits: float, dense_bits: float) -> str:
    difference = moe_bits / dense_bits - 1
    if abs(difference) < SAME:
        return "no clear difference"
    return f"{abs(difference):.1%} {'better' if difference < 0 else 'worse'}"


def _time_clause(found: Comparison) -> str:
    if found.time_ratio is None:
        return ""
    if _near(found.time_ratio, 1.0):
        return ", in about the same time"
    if _near(found.moe_tokens, found.dense_tokens):
        return f", in {found.time_ratio:.1f}× the time"
    return f", in {found.time_ratio:.1f}× the total time"


def domain_sentence(found: Comparison) -> str:
    """In how many domains the MoE is ahead, and where most and least."""
    gains = {d: found.dense.final_bits_per_byte[d] - found.moe.final_bits_per_byte[d] for d in found.domains}
    ahead = sum(gain > 0 for gain in gains.values())
    most, least = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    text = f"The MoE is ahead in {ahead} of {len(gains)} domains"
    if len(gains) == 1:
        return f"{text}."
    ends = " to ".join(f"{_signed(-gains[domain])} ({domain})" for domain in (most, least))
    return f"{text}: by domain the difference runs from {ends} bits/byte."


def _at_equal_time(moe: Run, dense: Run, domains: Sequence[str]) -> EqualTime | None:
    curves = [mean_curve(run, domains) for run in (moe, dense)]
    if any(len(curve["seconds"]) < 2 for curve in curves):
        return None
    seconds = min(curve["seconds"][-1] for curve in curves)
    if any(seconds < curve["seconds"][0] for curve in curves):
        return None
    moe_bits, dense_bits = (float(np.interp(seconds, curve["seconds"], curve["bits"])) for curve in curves)
    return EqualTime(seconds=float(seconds), moe_bits=moe_bits, dense_bits=dense_bits)


def mean_curve(run: Run, domains: Sequence[str]) -> dict[str, list[float]]:
    """Mean bits/byte over `domains` at every step that evaluated all of them."""
    by_step: dict[int, dict[str, float]] = {}
    for point in run.evaluation:
        by_step.setdefault(point.step, {})[point.domain] = point.bits_per_byte
    steps = sorted(step for step, found in by_step.items() if set(domains) <= found.keys())
    bits = [float(np.mean([by_step[step][domain] for domain in domains])) for step in steps]
    return {"bits": bits, **places(run, steps)}


def places(run: Run, steps: Sequence[int]) -> dict[str, list[float]]:
    """Tokens and seconds at some steps, from the training curve and 0 at step 0."""
    at = [0, *(point.step for point in run.training)]
    tokens = [0.0, *(float(point.tokens) for point in run.training)]
    seconds = [0.0, *(point.seconds for point in run.training)]
    return {
        "tokens": np.interp(steps, at, tokens).tolist(),
        "seconds": np.interp(steps, at, seconds).tolist(),
    }


def common_domains(runs: Iterable[Run]) -> tuple[str, ...]:
    """Domains that every run was finally evaluated on, in the order of the first."""
    first, *others = runs
    return tuple(d for d in first.final_bits_per_byte if all(d in run.final_bits_per_byte for run in others))


def mean_bits(run: Run) -> float:
    """Mean of the final bits/byte, each domain weighing the same."""
    return float(np.mean(list(run.final_bits_per_byte.values())))


def _signed(number: float) -> str:
    return "0.000" if abs(number) < 0.0005 else f"{number:+.3f}".replace("-", "−")


def _near(first: float, second: float) -> bool:
    return abs(first - second) <= EQUAL * max(abs(first), abs(second))


def short_number(number: float) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


# What a report is made of


@dataclass(frozen=True, kw_only=True)
class CorpusDomain:
    """One kind of text that was trained on."""

    name: str
    size_bytes: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class TrainingPoint:
    """After `step` steps: tokens trained on, loss in nats per token, seconds of training (evaluation not counted)."""

    step: int
    tokens: int
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluationPoint:
    """Bits per byte of one domain's held-out text after `step` steps."""

    step: int
    domain: str
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained model. Speeds are tokens per second; decoding is of one sequence."""

    name: str
    kind: Literal["dense", "moe"]
    parameters_total: int
    parameters_active: int
    flops_per_token: int
    training: tuple[TrainingPoint, ...]
    evaluation: tuple[EvaluationPoint, ...]
    final_bits_per_byte: Mapping[str, float]
    train_tokens_per_s: float
    decode_tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class HealthPoint:
    """One layer's routing around `step`; `load_E` is load over an equal part, see `stats.RoutingHealth`."""

    step: int
    layer: int
    load_E: tuple[float, ...]
    max_vio: float
    load_entropy: float
    dead: int


@dataclass(frozen=True, kw_only=True)
class ExpertTokens:
    """Favourite tokens of one expert: (text, share of its occurrences, occurrences)."""

    layer: int
    expert: int
    tokens: tuple[tuple[str, float, int], ...]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a run wrote after a prompt."""

    run: str
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RoutedToken:
    """One token's text and, per layer of `RoutedText.layers`, its (expert, weight) pairs."""

    text: str
    choices_L: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, kw_only=True)
class RoutedText:
    """A text whose routing is shown token by token."""

    layers: tuple[int, ...]
    tokens: tuple[RoutedToken, ...]


@dataclass(frozen=True, kw_only=True)
class EqualTime:
    """Mean bits/byte of both runs after the same seconds of training, read off their evaluation curves."""

    seconds: float
    moe_bits: float
    dense_bits: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An MoE run beside a dense one; bits are means over `domains`, each domain weighing the same."""

    moe: Run
    dense: Run
    domains: tuple[str, ...]
    moe_bits: float
    dense_bits: float
    moe_tokens: int
    dense_tokens: int
    time_ratio: float | None
    equal_time: EqualTime | None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report shows; no tensors.

    Args:
        title: Name of the experiment.
        host: The machine in a line: processor, cores, torch version.
        command: What to run to get this again.
        runs: At least one; the first MoE and the first dense one are compared.
        corpus: What was trained on.
        health: The router over time, of the MoE run.
        specialization: Which expert takes which domain.
        top_tokens: Favourite tokens of experts.
        routed_text: One text, token by token.
        generations: What the runs write.
        notes: Honest caveats, one sentence each.
    """

    title: str
    host: str
    command: str
    runs: tuple[Run, ...]
    corpus: tuple[CorpusDomain, ...] = ()
    health: tuple[HealthPoint, ...] = ()
    specialization: Specialization | None = None
    top_tokens: tuple[ExpertTokens, ...] = ()
    routed_text: RoutedText | None = None
    generations: tuple[Generation, ...] = ()
    notes: tuple[str, ...] = ()

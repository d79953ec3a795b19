"""When a router is going wrong: the layer, the step, the figure, what would be fair, and what to try.

Nothing is judged by one step, and nothing that too few pairs could have made by chance: a window reaches back
from the last step until it holds enough pairs per expert to tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moiety.errors import UsageError
from moiety.observe.stats import RoutingHealth

__all__ = ["HISTORY", "Alarm", "AlarmKind", "BatchAdvice", "batch_advice", "collapse"]

AlarmKind = Literal["collapsed", "dead", "overconfident"]
History = Sequence[tuple[int, Mapping[int, RoutingHealth]]]
Integers = npt.NDArray[np.int64]
Steps = Sequence[tuple[int, RoutingHealth]]

HISTORY = 100  # steps worth handing to `collapse`
STEPS = 10  # a window, unless the steps have few pairs per expert
FEWEST_STEPS = 5
DEAD_STEPS = 50  # young routers swing, and an expert that idles for twenty steps mostly comes back
SURE_PAIRS = 200  # per expert: even one with a tenth of its fair share has 20 then, and by no chance below 4
SOME_PAIRS = 20  # per expert: chance takes 3 % from the effective number of experts
IDLE = 0.02  # of the fair share
DEAD_SHARE = 1 / 8  # of the experts
COLLAPSED = 1 / 6  # of the way from "all tokens use the same k experts" to "all experts equally"
CERTAIN = 0.05  # of ln E
FAR = 16.0  # e^-16 is what float32 rounds off 1: beyond it a softmax is one number and zeros

MANY_EXPERTS_NAMED = 6


def collapse(history: History, *, null_experts: int = 0, sparse_scores: bool = False) -> tuple[Alarm, ...]:
    """What is wrong with any layer at the last step of `history`; nothing is kept between calls.

    Three kinds. "collapsed": few experts do all the work, judged by the effective number of experts, exp of the
    entropy of the load, which is E when even and k when all tokens go the same way. "dead": at least an eighth
    of the experts got next to nothing for fifty steps. "overconfident": a token's scores leave no doubt (mean
    entropy below 0.05 ln E), or logits are so large that they cannot (root mean square of logsumexp above
    ln E + 16); either way the router's gradient vanishes and it cannot take a decision back.

    An alarm comes again at every step at which it holds; `layer` and `kind` tell whether it was there before.

    Args:
        history: (step, health of every MoE layer) of the latest steps, oldest first; the last `HISTORY` are enough.
            A layer that is missing in some steps is judged by the others.
        null_experts: How many of the router's choices, the last ones, are no experts.
        sparse_scores: True for a router whose scores are zero for whom it does not choose, as ReLU's are:
            their low entropy is then no sign of anything.
    """
    alarms = []
    for layer in sorted(history[-1][1]) if history else ():
        steps = [(step, layers[layer]) for step, layers in history[-HISTORY:] if layer in layers]
        found = (_load_alarm(layer, steps, null_experts), _doubt_alarm(layer, steps, sparse_scores))
        alarms += [alarm for alarm in found if alarm is not None]
    return tuple(alarms)


def batch_advice(tokens: int, experts: int, experts_per_token: int) -> BatchAdvice:
    """Whether a step has enough tokens for its experts to learn from and its balance to be measured.

    Args:
        tokens: In one optimizer step: sequences x length x accumulated micro-batches x ranks.
        experts: E.
        experts_per_token: k.

    Raises:
        UsageError: a number that is not positive, or k above E.
    """
    for name, number in (("tokens", tokens), ("experts", experts), ("experts_per_token", experts_per_token)):
        if number < 1:
            raise UsageError(f"{name} is {number}; it must be positive")
    if experts_per_token > experts:
        raise UsageError(
            f"experts_per_token is {experts_per_token}, but there are {experts} experts",
            hint=f"choose from 1 to {experts}",
        )
    share = experts_per_token / experts
    return BatchAdvice(
        tokens=tokens,
        experts=experts,
        experts_per_token=experts_per_token,
        tokens_per_expert=tokens * share,
        load_noise=math.sqrt((1 - share) / (tokens * share)),
    )


def _window(steps: Steps, width: int, *, at_least: int, pairs_per_expert: int) -> _Window:
    """The last steps: so many if there are, and as many more as it takes to see that many pairs per expert."""
    counts_E = np.zeros(width, np.int64)
    used = tokens = dropped = 0
    for used, (_, one) in enumerate(reversed(steps), start=1):
        counts_E += one.counts_E[:width]
        tokens, dropped = tokens + one.tokens, dropped + one.dropped
        if used >= at_least and counts_E.sum() >= pairs_per_expert * width:
            break
    return _Window(counts_E, tokens, dropped, used)


def _load_alarm(layer: int, steps: Steps, null_experts: int) -> Alarm | None:
    """Collapsed or dead; a collapse can be told from fewer pairs."""
    width = len(steps[-1][1].counts_E) - null_experts
    if width < 2 or len(steps) < FEWEST_STEPS:
        return None
    step, seen = steps[-1][0], _window(steps, width, at_least=STEPS, pairs_per_expert=SOME_PAIRS)
    counts_E, pairs = seen.counts_E, seen.pairs
    if pairs == 0 and seen.tokens >= SURE_PAIRS:
        message = f"layer {layer}, step {step}: no token went to any expert {seen.over}"
        return Alarm(layer=layer, step=step, kind="dead", message=message, advice=NOBODY)
    if pairs < SOME_PAIRS * width:
        return None
    k = min(max((pairs + seen.dropped) / seen.tokens, 1.0), float(width))
    share_E = counts_E[counts_E > 0] / pairs
    effective = float(np.exp(-(share_E * np.log(share_E)).sum()))
    limit = k + COLLAPSED * (width - k)
    if effective < limit:
        busiest = np.argsort(-counts_E, kind="stable")[: max(round(effective), 1)]
        message = (
            f"layer {layer}, step {step}: {effective:.1f} of {width} experts do the work {seen.over}; "
            f"even would be {width}, below {limit:.1f} is a collapse. {_named(busiest)} got "
            f"{100 * counts_E[busiest].sum() / pairs:.0f} % of the pairs (fair: "
            f"{100 * len(busiest) / width:.0f} %), {len(seen.idle)} got next to none"
        )
        return Alarm(layer=layer, step=step, kind="collapsed", message=message, advice=COLLAPSE)
    if len(seen.idle) < DEAD_SHARE * width:
        return None
    seen = _window(steps, width, at_least=DEAD_STEPS, pairs_per_expert=SURE_PAIRS)
    idle = seen.idle
    if seen.steps < DEAD_STEPS or seen.pairs < SURE_PAIRS * width or len(idle) < DEAD_SHARE * width:
        return None
    message = (
        f"layer {layer}, step {step}: {_named(idle)} of {width} got less than {100 * IDLE:.0f} % of a fair share "
        f"{seen.over}; fair are {seen.pairs / width:,.0f} pairs, theirs were at most {seen.counts_E[idle].max():,}"
    )
    return Alarm(layer=layer, step=step, kind="dead", message=message, advice=DEAD)


def _doubt_alarm(layer: int, steps: Sequence[tuple[int, RoutingHealth]], sparse_scores: bool) -> Alarm | None:
    """Overconfident, over the last steps."""
    recent = [one for _, one in steps[-STEPS:] if one.tokens]
    if len(recent) < FEWEST_STEPS or len(recent[-1].counts_E) < 2:
        return None
    step, choices = steps[-1][0], len(recent[-1].counts_E)
    over = f"over the last {len(recent)} steps"
    entropy = _mean([(one.router_entropy, one.tokens) for one in recent])
    squared = _mean([(one.router_z, one.tokens) for one in recent])
    said = []
    if entropy is not None and entropy < CERTAIN and not sparse_scores:
        said.append(
            f"a token's scores have {100 * entropy:.1f} % of the entropy of no opinion {over} "
            f"(below {100 * CERTAIN:.0f} % there is no doubt left)"
        )
    if squared is not None and math.sqrt(squared) > math.log(choices) + FAR:
        size = math.sqrt(squared)
        said.append(
            f"logsumexp of the logits is {size:.0f} {over} (logits of 0 give {math.log(choices):.1f}; above "
            f"{math.log(choices) + FAR:.1f} they are too large)"
        )
    if not said:
        return None
    message = f"layer {layer}, step {step}: {'; '.join(said)}: the router learns no more from its mistakes"
    return Alarm(layer=layer, step=step, kind="overconfident", message=message, advice=OVERCONFIDENT)


def _mean(numbers: Sequence[tuple[float | None, int]]) -> float | None:
    """Mean weighted by tokens of those that are known."""
    known = [(number, tokens) for number, tokens in numbers if number is not None]
    total = sum(tokens for _, tokens in known)
    return sum(number * tokens for number, tokens in known) / total if total else None


def _named(experts: Integers) -> str:
    """`expert 3`, `experts 1, 4`, or `17 experts (0, 1, 2, ...)`."""
    names = ", ".join(str(expert) for expert in sorted(experts[:MANY_EXPERTS_NAMED].tolist()))
    if len(experts) == 1:
        return f"expert {names}"
    if len(experts) <= MANY_EXPERTS_NAMED:
        return f"experts {names}"
    return f"{len(experts)} experts ({names}, ...)"


COLLAPSE = (
    "raise balance_loss (0.01 is usual, 0.1 early on is not too much), or set selection_bias with a larger bias_rate; "
    "let the router learn more slowly (router_rate 0.1, more warmup); a collapse rarely mends itself, so go back "
    "to a checkpoint from before it"
)
DEAD = (
    "raise balance_loss early in the run, or use selection_bias, which calls idle experts back; a larger batch shows "
    "each expert more tokens a step; random experts during the first steps let all of them learn something"
)
NOBODY = (
    "the router's scores are all at zero, from where it gets no gradient: lower the sparsity coefficient or the "
    "router's learning rate (router_rate), and go back to a checkpoint from before"
)
OVERCONFIDENT = (
    "raise z_loss (0.001 is usual), which keeps logits small; lower router_rate to 0.1 to 0.5 or lengthen warmup, so "
    "that the router does not decide before the experts differ; a temperature above 1 softens it at once"
)


class _Window(NamedTuple):
    """What the experts got over some steps."""

    counts_E: Integers
    tokens: int
    dropped: int
    steps: int

    @property
    def over(self) -> str:
        return f"over the last {self.steps} steps"

    @property
    def pairs(self) -> int:
        return int(self.counts_E.sum())

    @property
    def idle(self) -> Integers:
        """Experts that got next to nothing."""
        return np.flatnonzero(self.counts_E < IDLE * self.pairs / len(self.counts_E))


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One finding about one layer.

    Args:
        layer: Number of the block.
        step: The last step that was looked at.
        kind: "collapsed", "dead" or "overconfident".
        message: Layer, step, figure, and what would be fair.
        advice: What to try, in plain words.
    """

    layer: int
    step: int
    kind: AlarmKind
    message: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class BatchAdvice:
    """How many tokens an expert sees in a step, and how much of its load is chance.

    Args:
        tokens: In one optimizer step.
        experts: E.
        experts_per_token: k.
        tokens_per_expert: k T / E.
        load_noise: Standard deviation of an expert's load over its mean when routing is even and tokens are
            independent, sqrt((1 - k/E) / (k T / E)); tokens of one text are alike, so the true one is larger.
    """

    tokens: int
    experts: int
    experts_per_token: int
    tokens_per_expert: float
    load_noise: float

    @property
    def verdict(self) -> Literal["too few", "few", "enough"]:
        """Noise above 25 %, above 10 %, or below. These limits are a rule of thumb of ours, from no paper."""
        if self.load_noise > 0.25:
            return "too few"
        return "few" if self.load_noise > 0.1 else "enough"

    @property
    def tokens_wanted(self) -> int:
        """Tokens in a step that bring the noise down to 10 %."""
        share = self.experts_per_token / self.experts
        return max(math.ceil(round(100 * (1 - share) / share, 6)), 1)

    @property
    def message(self) -> str:
        """The numbers and what they mean, in plain words."""
        seen = (
            f"{self.tokens:,} tokens in a step, {self.experts_per_token} of {self.experts} experts each: "
            f"{self.tokens_per_expert:,.1f} tokens per expert and step; its load varies by "
            f"{100 * self.load_noise:.0f} % by chance alone"
        )
        if self.verdict == "enough":
            return f"{seen}: enough"
        consequence = {
            "too few": "too few: experts learn from noise, and idle ones cannot be told from unlucky ones",
            "few": "few: the balance loss and the selection bias partly chase noise",
        }[self.verdict]
        return (
            f"{seen}: {consequence}. {self.tokens_wanted:,} tokens would bring it to 10 %: a larger batch, more "
            "accumulation with the balance counted over the whole step, or fewer experts. Counting the balance over "
            "more sequences helped up to about 128 of them (arXiv 2501.11873)"
        )

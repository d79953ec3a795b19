"""Each router by its definition: one token at a time, in plain Python over float64 numbers.

What a router draws at random is handed in (`Luck`), what it decides comes out as lists of experts, and the weights
are row by row formulas that autograd can follow. The router classes are read as descriptions only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moiety.moe.routers import (
    Base,
    ExpertChoice,
    GShard,
    Hash,
    NoisyTopK,
    ReLU,
    Router,
    RouterContext,
    SigmoidTopK,
    Sinkhorn,
    SparseMixer,
    Switch,
    TopK,
    TopP,
)
from moiety.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Luck:
    """The random numbers of one call and its token ids: the definition is handed them and draws none.

    Args:
        token_id_T: Token ids.
        keep_T: GShard's draws about its second expert.
        race_KTE: SparseMixer's exponential draws.
        coin_TK: SparseMixer's coins.
        normal_TE: Noise of the logits, not scaled yet.
        factor_TD: Jitter of the router's input.
    """

    token_id_T: Tensor | None = None
    keep_T: Tensor | None = None
    race_KTE: Tensor | None = None
    coin_TK: Tensor | None = None
    normal_TE: Tensor | None = None
    factor_TD: Tensor | None = None


class Decision(NamedTuple):
    """Of each token the experts it wanted, in order of choice, and those of them that it got."""

    wanted: list[list[int]]
    chosen: list[list[int]]


NO_LUCK = Luck()


def luck_of(
    router: Router,
    tokens: int,
    experts: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    width: int = 1,
    token_id_T: Tensor | None = None,
) -> Luck:
    """What a layer whose logits are of `dtype` draws with this seed in training."""
    draw = RouterContext(logits_TE=torch.empty(0), seed=seed).generator
    of_layer = torch.Generator().manual_seed((seed * 0x9E3779B1 + 0x27D4EB2F) % 2**32)
    race, places = draw(2), router.k if isinstance(router, SparseMixer) else 0
    jitter, factor_TD, normal_TE = router.needs.jitter, None, None
    if jitter:
        factor_TD = torch.empty(tokens, width, dtype=dtype)
        factor_TD = factor_TD.uniform_(1 - jitter, 1 + jitter, generator=of_layer)
    if router.needs.noise:
        normal_TE = torch.empty(tokens, experts, dtype=dtype).normal_(generator=of_layer)
    races = [
        torch.empty(tokens, experts, dtype=dtype).exponential_(generator=race).double() for _ in range(places)
    ]
    return Luck(
        token_id_T=token_id_T,
        keep_T=torch.rand(tokens, generator=draw(1)),
        race_KTE=torch.stack(races) if races else None,
        coin_TK=torch.rand(tokens, places, generator=draw(3)) if places else None,
        normal_TE=normal_TE,
        factor_TD=factor_TD,
    )


def best(score: Mapping[int, float], k: int) -> list[int]:
    """The k highest entries, of equals the lower key, in ascending order."""
    return sorted(sorted(score, key=lambda e: (-score[e], e))[:k])


def score_of(router: Router, logits: Tensor) -> Tensor:
    """Sigmoid, softmax, what is positive, or the same for all: from their formulas."""
    if isinstance(router, SigmoidTopK | Sinkhorn | Base):
        return 1 / (1 + (-logits).exp())
    if isinstance(router, ReLU):
        return logits * (logits > 0)
    if isinstance(router, Hash):
        return torch.ones_like(logits) / logits.shape[-1]
    if isinstance(router, TopK) and router.cap:
        squared = (2 * logits / router.cap).exp()
        logits = router.cap * (squared - 1) / (squared + 1)
    exp = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    return exp / exp.sum(-1, keepdim=True)


def _top_k_of_groups(router: TopK | SigmoidTopK, judged: list[float]) -> list[int]:
    size = len(judged) // router.groups
    group = {
        g: sum(sorted(judged[g * size : (g + 1) * size])[-router.group_best :]) for g in range(router.groups)
    }
    kept = best(group, router.groups_kept) if router.groups_kept < router.groups else list(group)
    return best({e: s for e, s in enumerate(judged) if e // size in kept}, router.k)


def _until_p(router: TopP, score: dict[int, float]) -> list[int]:
    """The best first, until the sum before the next one reaches p."""
    taken: list[int] = []
    for e in sorted(score, key=lambda e: (-score[e], e)):
        if taken and (sum(score[i] for i in taken) >= router.p or len(taken) == router.most):
            break
        taken.append(e)
    return sorted(taken)


def _mixed(token_id: int, salt: int) -> int:
    h = (token_id * 0x9E3779B1 + salt * 0x85EBCA6B + 0x165667B1) % 2**32
    h = (h ^ (h >> 15)) * 0x2C1B3C6D % 2**32
    h = (h ^ (h >> 13)) * 0x2C1B3C6D % 2**32
    return h ^ (h >> 16)


def _hashed(router: Hash, token_id: int, experts: int) -> list[int]:
    """The first expert by one hash, the next ones from a place that another hash says, going round."""
    first = _mixed(token_id, router.salt) % experts
    others = [(first + 1 + i) % experts for i in range(experts - 1)]
    start = _mixed(token_id, router.salt + 1) % max(experts - 1, 1)
    return [first] + [others[(start + i) % (experts - 1)] for i in range(router.k - 1)]


def racing(router: SparseMixer, logit_E: list[float], gone: Collection[int]) -> list[int]:
    """Who is near enough to the best that is left: a relative distance of at most 2 * jitter."""
    left = [e for e in range(len(logit_E)) if e not in gone]
    top = max(logit_E[e] for e in left)
    return [e for e in left if top - logit_E[e] <= 2 * router.jitter * max(abs(logit_E[e]), top)]


def _mix(router: SparseMixer, logit_E: list[float], race_KE: Tensor | None) -> list[int]:
    """One winner after the other; in training, the Gumbel maximum of those that race."""
    chosen: list[int] = []
    for place in range(router.k):
        speed = {e: logit_E[e] for e in racing(router, logit_E, chosen)}
        if race_KE is not None:
            speed = {e: logit - math.log(float(race_KE[place, e])) for e, logit in speed.items()}
        chosen += best(speed, 1)
    return chosen


def choose_token(
    router: Router, t: int, logit_E: list[float], score_E: list[float], luck: Luck, training: bool
) -> tuple[list[int], list[int]]:
    """What one token wants, in order of choice, and what it gets, where no other token matters."""
    score = dict(enumerate(score_E))
    if isinstance(router, GShard):
        wanted = best(score, 1)
        wanted += best({e: s for e, s in score.items() if e not in wanted}, 1)
        share = score_E[wanted[1]] / (score_E[wanted[0]] + score_E[wanted[1]])
        if training and luck.keep_T is not None and 2 * share <= float(luck.keep_T[t]):
            return wanted, wanted[:1]
        return wanted, wanted
    if isinstance(router, TopK | SigmoidTopK):
        wanted = _top_k_of_groups(router, score_E)
    elif isinstance(router, NoisyTopK | Sinkhorn):
        wanted = best(score, router.k)
    elif isinstance(router, Switch | Base):
        wanted = best(score, 1)
    elif isinstance(router, TopP):
        wanted = _until_p(router, score)
    elif isinstance(router, ReLU):
        wanted = [e for e, logit in enumerate(logit_E) if logit > 0]
    elif isinstance(router, Hash):
        assert luck.token_id_T is not None
        wanted = _hashed(router, int(luck.token_id_T[t]), len(logit_E))
    else:
        assert isinstance(router, SparseMixer), router
        race_KE = luck.race_KTE[:, t] if training and luck.race_KTE is not None else None
        wanted = _mix(router, logit_E, race_KE)
    return wanted, wanted


def _log_sum(values: Collection[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def sinkhorn_plan(logit_TE: list[list[float]], rounds: int) -> list[list[float]]:
    """Log scores of real tokens after scaling columns, then rows, `rounds` times."""
    for _ in range(rounds):
        column_E = [_log_sum(column) for column in zip(*logit_TE, strict=True)]
        logit_TE = [[v - c for v, c in zip(row, column_E, strict=True)] for row in logit_TE]
        logit_TE = [[v - _log_sum(row) for v in row] for row in logit_TE]
    return logit_TE


def choose(
    router: Router,
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
    luck: Luck = NO_LUCK,
    training: bool = False,
) -> Decision:
    """Who goes where: token after token, or all together where the router divides a batch."""
    tokens, experts = logits_TE.shape
    logit_TE = logits_TE.detach().double().tolist()
    judged = score_of(router, logits_TE.detach().double())
    judged_TE = (judged if bias_E is None else judged + bias_E.double()).tolist()
    real = [t for t in range(tokens) if valid_T is None or bool(valid_T[t])]
    decision = Decision([[] for _ in range(tokens)], [[] for _ in range(tokens)])
    if isinstance(router, ExpertChoice):
        for e in range(experts):
            taken = math.ceil(len(real) * router.k / experts)
            for t in best({t: judged_TE[t][e] for t in real}, taken):
                decision.wanted[t].append(e)
                decision.chosen[t].append(e)
        return decision
    plan = judged_TE
    if isinstance(router, Sinkhorn) and training and real:
        plan = list(judged_TE)
        for t, row in zip(real, sinkhorn_plan([logit_TE[t] for t in real], router.rounds), strict=True):
            plan[t] = row
    assert not (isinstance(router, Base) and training), "an assignment is judged by its sum, not defined"
    for t in real:
        decision.wanted[t], decision.chosen[t] = choose_token(router, t, logit_TE[t], plan[t], luck, training)
    return decision


def _mixer_weights(router: SparseMixer, logit_E: Tensor, wanted: list[int], coin_K: Tensor | None) -> Tensor:
    """Of each chosen expert its share of its race; in training a third of it, unless it led or the coin says so."""
    weight_E, gone = torch.zeros_like(logit_E), []
    for place, e in enumerate(wanted):
        runners = racing(router, logit_E.tolist(), gone)
        share_R = (logit_E[runners] - logit_E[runners].max().detach()).exp()
        share_R = share_R / share_R.sum()
        share = share_R[runners.index(e)]
        led = float(share.detach()) >= float(share_R.detach().max())
        if coin_K is not None and not led and float(coin_K[place]) <= 0.75:
            share = share - share.detach() * 2 / 3
        weight_E = weight_E + share * torch.nn.functional.one_hot(torch.tensor(e), len(logit_E))
        gone.append(e)
    return weight_E


def _is_divided(router: Router) -> bool:
    """True where the weights of what a token wanted sum to 1."""
    if isinstance(router, Sinkhorn):
        return router.k > 1
    if isinstance(router, TopK | SigmoidTopK | TopP):
        return router.renormalize
    return isinstance(router, NoisyTopK | GShard)


def weigh(
    router: Router, logits_TE: Tensor, decision: Decision, luck: Luck = NO_LUCK, training: bool = False
) -> Tensor:
    """Combine weights as a dense matrix, zero where not chosen, differentiable; each row by itself."""
    experts = logits_TE.shape[1]
    if isinstance(router, SparseMixer):
        coins = luck.coin_TK if training else None
        rows = [
            _mixer_weights(router, logit_E, decision.wanted[t], None if coins is None else coins[t])
            for t, logit_E in enumerate(logits_TE.unbind(0))
        ]
        return torch.stack(rows) if rows else logits_TE * 1
    score_TE, chosen_TE = score_of(router, logits_TE), mask_of(decision.chosen, experts)
    if isinstance(router, Hash):
        return chosen_TE.to(logits_TE.dtype) / router.k
    weight_TE = score_TE * chosen_TE
    if _is_divided(router):
        total_T1 = (score_TE * mask_of(decision.wanted, experts)).sum(1, keepdim=True)
        weight_TE = weight_TE / torch.where(total_T1 > 0, total_T1, 1)
    return weight_TE * router.scale if isinstance(router, TopK | SigmoidTopK) else weight_TE


def mask_of(lists: list[list[int]], experts: int) -> Tensor:
    """Lists of experts as a mask, bool (T, E)."""
    mask_TE = torch.zeros(len(lists), experts, dtype=torch.bool)
    for t, chosen in enumerate(lists):
        mask_TE[t, chosen] = True
    return mask_TE


def route(
    router: Router,
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
    luck: Luck = NO_LUCK,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Chosen experts, bool (T, E), and their weights (T, E), differentiable: token after token."""
    decision = choose(router, logits_TE, bias_E, valid_T, luck, training)
    chosen_TE = mask_of(decision.chosen, logits_TE.shape[1])
    return chosen_TE, weigh(router, logits_TE, decision, luck, training)


def assert_well_formed(routing: Routing) -> None:
    """What holds for any `Routing`: sorted, counted, each pair once, no padding, weights finite and not negative."""
    place_N = routing.expert_N * routing.tokens + routing.token_N
    assert bool((place_N.diff() > 0).all()), (
        "pairs are not sorted by expert, then token, or one is there twice"
    )
    counts = torch.bincount(routing.expert_N, minlength=routing.experts)
    assert torch.equal(counts, routing.counts_E) and int(counts.sum()) == routing.pairs
    assert routing.weight_N.shape == routing.token_N.shape == routing.expert_N.shape
    if routing.pairs:
        assert int(routing.token_N.min()) >= 0 and int(routing.token_N.max()) < routing.tokens
        assert int(routing.expert_N.max()) < routing.experts
    if routing.valid_T is not None:
        assert bool(routing.valid_T[routing.token_N].all()), "padding was routed"
    assert bool(routing.weight_N.isfinite().all()) and bool((routing.weight_N >= 0).all())

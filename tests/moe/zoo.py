"""The built-in routers, each in a setting where it has something to do, and layers around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moiety.moe.capacity import POLICIES, QUEUE
from moiety.moe.layer import MoE
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
from tests.router_oracle import Decision

EXPERTS, WIDTH = 10, 16
ZOO: dict[str, Router] = {
    "softmax": TopK(3),
    "softmax_groups": TopK(2, renormalize=False, groups=5, groups_kept=2, scale=1.5, bias=True),
    "softmax_capped": TopK(3, renormalize=False, cap=1.5),
    "sigmoid": SigmoidTopK(3, groups=5, groups_kept=3, scale=2.5),
    "switch": Switch(),
    "switch_jitter": Switch(jitter=0.2),
    "noisy": NoisyTopK(3),
    "gshard": GShard(),
    "top_p": TopP(p=0.5),
    "top_p_at_most": TopP(p=0.6, most=3, renormalize=True),
    "relu": ReLU(),
    "sparsemixer": SparseMixer(2, jitter=0.4),
    "sparsemixer_3": SparseMixer(3, jitter=0.1),
    "hash": Hash(2),
    "expert_choice": ExpertChoice(2),
    "sinkhorn": Sinkhorn(2),
    "sinkhorn_1": Sinkhorn(1),
    "base": Base(),
}
SEED = 11
OVERFLOWS = (*POLICIES, QUEUE)


def decide(
    router: Router,
    logits_TE: Tensor,
    *,
    seed: int = SEED,
    training: bool = False,
    valid_T: Tensor | None = None,
    bias_E: Tensor | None = None,
    token_id_T: Tensor | None = None,
) -> Routing:
    """The three questions in a row, as the layer asks them."""
    context = RouterContext(
        logits_TE=logits_TE,
        valid_T=valid_T,
        bias_E=bias_E,
        token_id_T=token_id_T,
        training=training,
        seed=seed,
    )
    score_TE = router.score(logits_TE, context)
    pairs = router.choose(score_TE.detach(), context)
    chosen = pairs if pairs.wanted is None else pairs.wanted
    weight_N = router.weigh(score_TE, chosen, context)
    return pairs.with_weights(weight_N if pairs.kept_N is None else weight_N[pairs.kept_N])


def decision_of(routing: Routing) -> Decision:
    """What a routing chose, as lists."""
    lists = [row.nonzero().squeeze(1).tolist() for row in routing.mask_TE]
    return Decision(lists, lists)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer_of(router: Router, *, dtype: torch.dtype = torch.float64, **changes: Any) -> MoE:
    """A layer whose numbers are exact in bfloat16, nothing of it zero."""
    layer = MoE(**{"d_model": WIDTH, "d_ff": 8, "experts": EXPERTS, "router": router} | changes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.4).bfloat16())
        if layer.selection_bias is not None:
            layer.selection_bias.normal_(std=0.2)
    return layer.to(dtype)


def tokens_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape).bfloat16().to(dtype)


def refuses(router: Router, policy: str) -> bool:
    return isinstance(router, SparseMixer) and policy in ("reroute", "dense")

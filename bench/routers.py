"""What routing costs: every router's own time, and a layer's step with each router against softmax top-k.

Two claims. Deciding, gathering rows and summing them back takes at most a tenth of a layer's forward, for routers of
token choice with 8 experts per token; with one or two, whose layer is that much smaller, and for routers that divide
a whole batch, the share is told without a bar. And a step (forward and backward) with any router takes at most 1.15
times that of softmax top-k with as many pairs; Zipf-1.5 skew costs a layer at most 15 %.

    python bench/routers.py [--quick] [--device cuda]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _harness import Row, arguments, compare, finish, time_in_turn
from torch import Tensor

import moiety
from moiety.moe.routers import (
    Base,
    ExpertChoice,
    GShard,
    Hash,
    NoisyTopK,
    ReLU,
    Router,
    SigmoidTopK,
    Sinkhorn,
    SparseMixer,
    Switch,
    TopK,
    TopP,
)

OVERHEAD_BAR, ROUTER_BAR, SKEW_BAR = 0.10, 1 / 1.15, 1 / 1.15
BY_BATCH = ("expert_choice", "sinkhorn", "base")  # not token choice: the bar on overhead is not for them


@dataclass(frozen=True)
class Shape:
    """A layer."""

    name: str
    experts: int
    k: int
    d_model: int
    d_ff: int


SHAPES = (
    Shape("E64 K8 D2048 F1024", 64, 8, 2048, 1024),
    Shape("E256 K8 D2048 F512", 256, 8, 2048, 512),
)


def tokens_with_logits(shape: Shape, tokens: int, skew: float, device: str) -> Tensor:
    """Tokens whose first E entries are their logits, log of a Zipf law plus Gumbel noise: the top k are k draws."""
    share_E = torch.arange(1, shape.experts + 1, dtype=torch.float64) ** -skew
    gumbel_TE = -torch.empty(tokens, shape.experts, dtype=torch.float64).exponential_().log()
    x_TD = torch.randn(tokens, shape.d_model, dtype=torch.float64)
    x_TD[:, : shape.experts] = share_E.log() + gumbel_TE
    return x_TD.bfloat16().to(device)


def layer_of(shape: Shape, router: Router, like: moiety.MoE | None, device: str) -> moiety.MoE:
    """A layer in training mode that reads the logits off its tokens, with the expert weights of `like`."""
    layer = moiety.MoE(
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        experts=shape.experts,
        router=router,
        router_bias=router.needs.gate,
        dtype=torch.bfloat16,
        device="meta" if like is not None else device,
    )
    if like is not None:
        layer.experts = like.experts
        layer = layer.to_empty(device=device) if layer.gate is None else _with_gate(layer, device)
        layer.experts = like.experts
    if layer.gate is not None:
        with torch.no_grad():
            layer.gate.weight.copy_(torch.eye(shape.experts, shape.d_model))
            layer.gate.bias.zero_()
    return layer.train()


def _with_gate(layer: moiety.MoE, device: str) -> moiety.MoE:
    """Memory for the small parts of a layer made without any."""
    for name in ("gate", "gate_noise"):
        part = getattr(layer, name)
        if part is not None:
            setattr(layer, name, part.to_empty(device=device))
            torch.nn.init.zeros_(getattr(layer, name).weight)
    if layer.selection_bias is not None:
        layer.selection_bias = torch.zeros(layer.choices, device=device)
    return layer


def zoo(shape: Shape) -> dict[str, tuple[Router, int]]:
    """Every router, and with how many pairs per token it is to be compared."""
    k = shape.k
    return {
        "sigmoid": (SigmoidTopK(k), k),
        "sigmoid, 8 groups": (SigmoidTopK(k, groups=8, groups_kept=4), k),
        "noisy": (NoisyTopK(k), k),
        "switch": (Switch(jitter=0.01), 1),
        "gshard": (GShard(), 2),
        "top_p": (TopP(0.5), k),
        "relu": (ReLU(), k),
        "sparsemixer": (SparseMixer(2), 2),
        "hash": (Hash(k), k),
        "expert_choice": (ExpertChoice(k), k),
        "sinkhorn": (Sinkhorn(k), k),
        "base": (Base(), 1),
    }


def with_k_pairs(layer: moiety.MoE, x_TD: Tensor, k: int) -> None:
    """Set what decides the number of pairs of a router without a k, so that a token has `k` on average."""
    assert layer.gate is not None
    logits_TE = x_TD[:, : layer.choices].float()
    if isinstance(layer.router, ReLU):
        edge = logits_TE.flatten().kthvalue(logits_TE.numel() - k * len(x_TD)).values
        with torch.no_grad():
            layer.gate.bias.fill_(-edge.item())
    if isinstance(layer.router, TopP):
        best_TE = logits_TE.softmax(1).sort(1, descending=True).values
        before_TE = best_TE.cumsum(1) - best_TE
        edge = before_TE.flatten().kthvalue(k * len(x_TD)).values
        layer.router = TopP(edge.item())


def steps(layer: moiety.MoE, x_TD: Tensor, ids_T: Tensor, grad_TD: Tensor) -> Callable[[], None]:
    """One forward and backward."""

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x_TD.grad = None
        layer(x_TD, token_ids=ids_T, seed=0).output.backward(grad_TD)

    return step


def overhead(
    name: str, shape: Shape, layer: moiety.MoE, x_TD: Tensor, ids_T: Tensor, seconds: float, cuda: bool
) -> Row:
    """Time to decide, gather and sum back, as a share of the layer's forward."""
    x_TD = x_TD.detach()
    with torch.no_grad():
        routing = layer.route(x_TD, token_id_T=ids_T, seed=0)
        y_ND = routing.gather(x_TD)
        weight_N = routing.weight_N.to(y_ND.dtype)

        def sum_back() -> Tensor:
            order_N = routing.pairs_of_token_N
            return torch.embedding_bag(
                y_ND, order_N, routing.first_pair_T, False, 0, False, weight_N[order_N]
            )[0]

        times = time_in_turn(
            {
                "route": lambda: layer.route(x_TD, token_id_T=ids_T, seed=0).pairs_of_token_N,
                "gather": lambda: routing.gather(x_TD),
                "sum": sum_back,
                "layer": lambda: layer(x_TD, token_ids=ids_T, seed=0),
            },
            seconds=seconds,
            least=3,
            cuda=cuda,
        )
    median = {part: statistics.median(values) for part, values in times.items()}
    spent = median["route"] + median["gather"] + median["sum"]
    share = spent / median["layer"]
    few = routing.pairs / len(x_TD) < 0.9 * shape.k
    bar = None if name in BY_BATCH or few else OVERHEAD_BAR
    parts = ", ".join(f"{part} {1e3 * median[part]:.1f}" for part in ("route", "gather", "sum"))
    return Row(
        case=f"{shape.name}, {name}: routing's share of the forward",
        ours=round(1e3 * spent, 3),
        peer=round(1e3 * median["layer"], 3),
        peer_name="layer",
        unit="ms",
        ratio=round(share, 4),
        bar=bar,
        met=None if bar is None else share <= bar,
        note=f"ratio is the share, at most the bar; {parts} ms; {routing.pairs / len(x_TD):.2f} pairs per token",
    )


def measure(
    shape: Shape, tokens: int, chosen: dict[str, tuple[Router, int]], seconds: float, device: str
) -> list[Row]:
    """All rows of one shape."""
    cuda = device == "cuda"
    x_TD = tokens_with_logits(shape, tokens, 0.0, device).requires_grad_()
    ids_T = torch.randint(0, 50_000, (tokens,), device=device)
    grad_TD = torch.randn_like(x_TD)
    base = layer_of(shape, TopK(shape.k), None, device)
    plain = {k: layer_of(shape, TopK(k), base, device) for k in {k for _, k in chosen.values()} | {shape.k}}
    rows = [overhead("softmax", shape, plain[shape.k], x_TD, ids_T, seconds, cuda)]
    for name, (router, k) in chosen.items():
        layer = layer_of(shape, router, base, device)
        if layer.gate is not None:
            with_k_pairs(layer, x_TD.detach(), k)
        rows.append(overhead(name, shape, layer, x_TD, ids_T, seconds, cuda))
        methods = {
            name: steps(layer, x_TD, ids_T, grad_TD),
            f"softmax top-{k}": steps(plain[k], x_TD, ids_T, grad_TD),
        }
        times = time_in_turn(methods, seconds=seconds, least=3, cuda=cuda)
        pairs = layer.route(x_TD.detach(), token_id_T=ids_T, seed=0).pairs / tokens
        rows.append(
            compare(
                f"{shape.name}, {name}: step",
                times,
                ours=name,
                peers=[f"softmax top-{k}"],
                bar=ROUTER_BAR,
                note=f"{pairs:.2f} pairs per token",
            )
        )
    skewed_TD = tokens_with_logits(shape, tokens, 1.5, device).requires_grad_()
    methods = {
        "zipf-1.5": steps(plain[shape.k], skewed_TD, ids_T, grad_TD),
        "balanced": steps(plain[shape.k], x_TD, ids_T, grad_TD),
    }
    times = time_in_turn(methods, seconds=seconds, least=3, cuda=cuda)
    rows.append(
        compare(f"{shape.name}, softmax: skew", times, ours="zipf-1.5", peers=["balanced"], bar=SKEW_BAR)
    )
    return rows


def main() -> int:
    """All rows, and the JSON line."""
    asked = arguments(__doc__ or "")
    torch.manual_seed(0)
    shapes, tokens, seconds = (SHAPES, 4096, 3.0)
    chosen = {shape: zoo(shape) for shape in shapes}
    if asked.quick:
        few = {name: chosen[SHAPES[0]][name] for name in ("top_p", "gshard", "base")}
        chosen, tokens, seconds = {SHAPES[0]: few}, 2048, 0.1
    rows = []
    for shape, routers in chosen.items():
        rows += measure(shape, tokens, routers, seconds, asked.device)
    return finish("routers", rows)


if __name__ == "__main__":
    sys.exit(main())

"""Our MoE layer against transformers' blocks, router and combine included.

Both layers hold the same weights and get the same tokens, made so that the router sends them evenly or
with Zipf-1.5 skew; their outputs are compared before anything is timed. `dense twin` is one dense
feed-forward of K times the width: what the same arithmetic costs without routing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _harness import Row, arguments, compare, finish, time_in_turn
from torch import Tensor

import moiety
from moiety.moe.experts import FeedForward

MOST_COPIED_BYTES = 4e9  # batched_mm copies every pair's expert; beyond this it does not fit


class Shape(NamedTuple):
    """One layer's sizes."""

    name: str
    experts: int
    k: int
    d_model: int
    d_ff: int


SHAPES = (
    Shape("small E8 K2 D256 F512", 8, 2, 256, 512),
    Shape("mixtral-like E8 K2 D1024 F3584", 8, 2, 1024, 3584),
    Shape("olmoe E64 K8 D2048 F1024", 64, 8, 2048, 1024),
)


def planted_tokens(shape: Shape, tokens: int, skew: float, dtype: torch.dtype, device: str) -> Tensor:
    """Tokens whose first E entries are their router logits: log of a Zipf law plus Gumbel noise, so that the
    top k are k draws without replacement."""
    share_E = torch.arange(1, shape.experts + 1, dtype=torch.float64) ** -skew
    gumbel_TE = -torch.empty(tokens, shape.experts, dtype=torch.float64).exponential_().log()
    x_TD = torch.randn(tokens, shape.d_model, dtype=torch.float64)
    x_TD[:, : shape.experts] = share_E.log() + gumbel_TE
    return x_TD.to(dtype).to(device)


def build_ours(shape: Shape, dtype: torch.dtype, device: str) -> moiety.MoE:
    """Our layer, its router reading the planted logits off the token."""
    layer = moiety.MoE(
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        experts=shape.experts,
        router=moiety.TopK(shape.k),
        dtype=dtype,
    )
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(shape.experts, shape.d_model))
    return layer.to(device)


def build_peer(shape: Shape, ours: moiety.MoE, implementation: str) -> torch.nn.Module:
    """transformers' Mixtral block around the very same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = torch.nn.Parameter(ours.gate.weight.detach().clone())
    block.experts.gate_up_proj = torch.nn.Parameter(ours.gate_up.detach())
    block.experts.down_proj = torch.nn.Parameter(ours.down.detach())
    return block


def peers_that_fit(shape: Shape, tokens: int, dtype: torch.dtype, backward: bool) -> list[str]:
    """transformers' implementations, without those that cannot run or would take minutes per call."""
    names = ["grouped_mm"]
    copied = tokens * shape.k * 3 * shape.d_model * shape.d_ff * dtype.itemsize
    if copied <= MOST_COPIED_BYTES:
        names.append("batched_mm")
    if not (backward and shape.experts > 8):  # makes a full-size zero gradient per expert: 28 s a call
        names.append("eager")
    return names


def steps(module: torch.nn.Module, x_TD: Tensor, grad_TD: Tensor, backward: bool) -> Callable[[], Any]:
    """One call to time."""
    wrapped = x_TD[None]  # transformers wants (sequences, positions, width)

    def output() -> Tensor:
        result = module(wrapped)
        y = result if isinstance(result, Tensor) else result[0]
        return y.view(x_TD.shape)

    def forward() -> None:
        with torch.no_grad():
            output()

    def forward_backward() -> None:
        module.zero_grad(set_to_none=True)
        x_TD.grad = None
        output().backward(grad_TD)

    return forward_backward if backward else forward


def kept_bytes(layer: moiety.MoE, x_TD: Tensor) -> int:
    """Bytes kept for backward besides parameters, counted by autograd's own hooks."""
    known = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x_TD)
    del output
    return sum(kept.values())


def measure(
    shape: Shape, tokens: int, dtype: torch.dtype, skew: float, device: str, seconds: float
) -> list[Row]:
    """The rows of one case."""
    x_TD = planted_tokens(shape, tokens, skew, dtype, device).requires_grad_()
    grad_TD = torch.randn(tokens, shape.d_model).to(dtype).to(device)
    ours = build_ours(shape, dtype, device)
    dense = FeedForward(shape.d_model, shape.k * shape.d_ff, dtype=dtype).to(device)
    kind = str(dtype).removeprefix("torch.")
    routing = "balanced" if skew == 0 else f"zipf-{skew}"
    rows = []
    for backward in (False, True):
        names = peers_that_fit(shape, tokens, dtype, backward)
        blocks = {name: build_peer(shape, ours, name) for name in names}
        for name, block in blocks.items():
            check_equal(shape, ours, block, x_TD, name)
        methods = {
            name: steps(module, x_TD, grad_TD, backward)
            for name, module in {"moiety": ours, "dense twin": dense, **blocks}.items()
        }
        least = 3 if tokens * shape.k * shape.d_ff * shape.d_model > 1e10 else 7
        times = time_in_turn(methods, seconds=seconds, least=least, cuda=device == "cuda")
        label = f"{shape.name}, {tokens} tokens, {kind}, {routing}, {'fwd+bwd' if backward else 'fwd'}"
        rows.append(compare(label, times, ours="moiety", peers=names, bar=1.0))
        rows.append(compare(label, times, ours="moiety", peers=["dense twin"], bar=None))
    allowed = (tokens * shape.d_model + tokens * shape.k * 2 * shape.d_ff) * dtype.itemsize
    kept = kept_bytes(ours, x_TD)
    scores = 2 * 4 * tokens * shape.experts + 6 * 8 * tokens * shape.k + 8 * tokens
    label = f"{shape.name}, {tokens} tokens, {kind}, {routing}, kept for backward"
    rows.append(
        Row(
            case=label,
            ours=kept / 1e6,
            peer=(allowed + scores) / 1e6,
            peer_name="x + pre-act.",
            unit="MB",
            ratio=round((allowed + scores) / kept, 3),
            bar=1.0,
            met=kept <= allowed + scores,
            note=f"x and pre-activation {allowed / 1e6:.2f} MB, routing (scores, pairs) {scores / 1e6:.2f} MB",
        )
    )
    return rows


def check_equal(shape: Shape, ours: moiety.MoE, peer: torch.nn.Module, x_TD: Tensor, name: str) -> None:
    """Refuse to time layers that do not compute the same thing.

    Tokens whose k-th and next logit are equal after rounding are left out: libraries settle ties differently.
    """
    best_TK = x_TD[:, : shape.experts].detach().float().topk(min(shape.k + 1, shape.experts)).values
    clear_T = best_TK[:, shape.k - 1] != best_TK[:, -1]
    with torch.no_grad():
        mine, theirs = ours(x_TD).output, peer(x_TD[None])
        theirs = (theirs if isinstance(theirs, Tensor) else theirs[0]).view(mine.shape)
    error = (mine - theirs)[clear_T].norm() / theirs[clear_T].norm()
    assert clear_T.float().mean() > 0.9, clear_T.float().mean()
    assert error < (2e-2 if x_TD.dtype == torch.bfloat16 else 1e-4), (name, float(error))


def main() -> int:
    """All cases, or with --quick the small ones."""
    options = arguments(__doc__ or "")
    torch.manual_seed(0)
    shapes = SHAPES[:1] if options.quick else SHAPES
    token_counts = (512,) if options.quick else (512, 4096)
    rows: list[Row] = []
    for shape, tokens, dtype, skew in itertools.product(
        shapes, token_counts, (torch.bfloat16, torch.float32), (0.0, 1.5)
    ):
        rows += measure(shape, tokens, dtype, skew, options.device, seconds=1.0 if options.quick else 2.5)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return finish("layer", rows)


if __name__ == "__main__":
    sys.exit(main())

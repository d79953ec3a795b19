"""Training on a processor without products of 16 bits: none is asked for anywhere, and the gradients are as good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moiety.backends import causal, matmul
from moiety.formats.policy import policy_named
from moiety.model.families import FAMILIES
from moiety.model.transformer import Transformer
from moiety.moe.soft import SoftMoE
from moiety.quant.quantize import quantize
from moiety.train.lora import LoraOptions, adapt
from tests import tiny
from tests.families import random_settings

PRODUCTS = (
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "linear",
    "_grouped_mm",
    "_linear_pointwise",
    "_scaled_dot_product",
)
HALVES = (torch.bfloat16, torch.float16)
# Plain, with shared experts, with sinks, with latent vectors, in chunks: every way to attend and to be an expert.
NAMES = ("olmoe", "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "llama4_text")


class Products(TorchDispatchMode):
    """Counts products, and names those of 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.halves = 0, list[str]()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name: str = func.overloadpacket.__name__
        if name.rstrip("_").startswith(PRODUCTS):
            self.all += 1
            if any(isinstance(one, Tensor) and one.dtype in HALVES for one in args):
                self.halves.append(name)
        return func(*args, **(kwargs or {}))


def step(
    model: Transformer, tokens: Tensor, autocast: bool = False
) -> tuple[Products, float, dict[str, Tensor]]:
    """The products of one step, its loss in nats a token, and what all that learns gets of it."""
    model.zero_grad()
    with Products() as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, seed=1).cross_entropy(tokens.roll(-1, 1)) / tokens.numel()
        loss.backward()
    found = {name: one.grad.float() for name, one in model.named_parameters() if one.grad is not None}
    return seen, float(loss.detach()), found


def compare(
    model: Transformer, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, autocast: bool = False
) -> None:
    """A step with torch's products of 16 bits beside one without; what rounding makes of a choice is small."""
    with monkeypatch.context() as patch:
        patch.setattr(matmul, "has_products", lambda dtype: True)
        there, expected, theirs = step(model, tokens, autocast)
    assert there.halves, "the step would never have asked"
    monkeypatch.setattr(matmul, "has_products", lambda dtype: dtype not in HALVES)
    monkeypatch.setattr(matmul, "FEWEST_ROWS_WIDE", 1)
    seen, loss, ours = step(model, tokens, autocast)
    assert seen.all > 20 and not seen.halves, seen.halves
    assert loss == pytest.approx(expected, abs=0.03) and ours.keys() == theirs.keys()
    mine, true = (torch.cat([one[name].flatten() for name in ours]) for one in (ours, theirs))
    assert torch.cosine_similarity(mine, true, dim=0) > 0.98
    assert float(mine.norm() / true.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer(name: str, autocast: bool, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    said = transformers.AutoConfig.for_model(name, **random_settings(name, 3)).to_dict()
    model = Transformer(FAMILIES[name].read(said)).train()
    tiny.fill(model)
    if not autocast:
        model = model.bfloat16()
    monkeypatch.setattr(causal, "FEWEST_POSITIONS", 16 if long else 999)
    compare(model, tiny.tokens(model, 2, 20), monkeypatch, autocast)


@pytest.mark.parametrize("form", ["", "int4-g32"])
def test_adapters(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny.model("shared").bfloat16()
    if form:
        quantize(model, policy_named(form))
    adapt(model, LoraOptions(rank=2, targets=("all",)))
    for name, one in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(one, std=0.1)
    compare(model.train(), tiny.tokens(model, 2, 20), monkeypatch)


def test_soft_mixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SoftMoE(d_model=16, d_ff=8, experts=3, slots=2).bfloat16()
    monkeypatch.setattr(matmul, "has_products", lambda dtype: dtype not in HALVES)
    monkeypatch.setattr(matmul, "FEWEST_ROWS_WIDE", 1)
    x = torch.randn(2, 7, 16, dtype=torch.bfloat16, requires_grad=True)
    with Products() as seen:
        layer(x).output.sum().backward()
    assert seen.all > 3 and not seen.halves, seen.halves

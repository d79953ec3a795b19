"""A router of the user's own: the example of the page, word for word, through everything."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import moiety
from moiety import backends
from moiety.cli.own import import_own_routers
from moiety.config import MoEConfig
from moiety.errors import ConfigError
from moiety.model.transformer import Transformer
from moiety.moe import routers
from moiety.moe.capacity import POLICIES, QUEUE, Capacity
from moiety.moe.layer import MoE
from moiety.moe.losses import LOSSES, LossContext
from moiety.moe.routers import AROUND, ROUTERS, Explore, Needs, RouterContext, Tempered, own_kind
from moiety.observe.stats import health
from moiety.routing import Routing
from moiety.schedule import Schedule
from tests import oracle, tiny
from tests.router_oracle import assert_well_formed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/routers.md").read_text(encoding="utf-8")
NAME, EXPERTS, WIDTH = "near_the_best", 7, 16


def example() -> str:
    (text,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(text)


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example in a file of its own, imported; forgotten afterwards."""
    (tmp_path / f"{NAME}.py").write_text(example(), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def config(**changes: Any) -> MoEConfig:
    values: dict[str, Any] = {
        "experts": EXPERTS,
        "experts_per_token": 2,
        "d_ff": 8,
        "router": f"{NAME}:Near",
        "router_options": ("share=0.4",),
    }
    return MoEConfig(**values | changes)


def layer_of(**changes: Any) -> MoE:
    values: dict[str, Any] = {"d_model": WIDTH, "d_ff": 8, "experts": EXPERTS}
    layer = MoE(**{"router": routers.from_config(config())} | values | changes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.4).bfloat16())
    return layer.to(changes.get("dtype", torch.float32))


def by_definition(layer: MoE, x_TD: Tensor, grad_TD: Tensor, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Output and gradients of a layer with this router, one token at a time or in plain torch."""
    wide = torch.promote_types(dtype, torch.float32)
    leaf = {name: p.detach().to(dtype, copy=True).requires_grad_() for name, p in layer.named_parameters()}
    x_TD = x_TD.detach().to(dtype, copy=True).requires_grad_()
    logits_TE = x_TD.to(wide) @ leaf["gate.weight"].to(wide).T
    score_TE = logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
    chosen_TE = torch.tensor(
        [[score >= 0.4 * max(row) for score in row] for row in score_TE.detach().tolist()]
    )
    weight_TE = score_TE * chosen_TE / (score_TE * chosen_TE).sum(1, keepdim=True)
    weight_TE.retain_grad()
    weights = dataclasses.replace(
        layer.experts.weights(dtype), up=leaf["experts.gate_up"], down=leaf["experts.down"]
    )
    multiply = oracle.definition if dtype == torch.float64 else oracle.plain
    y_TD = multiply(x_TD, chosen_TE, weight_TE, weights)
    y_TD.backward(grad_TD.to(dtype))
    assert weight_TE.grad is not None
    got = {"output": y_TD.detach(), "x": x_TD.grad, "combine": weight_TE.grad * chosen_TE}
    return got | {name: value.grad for name, value in leaf.items()}


# The page


def test_the_example_is_short_and_the_page_names_everything() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 20
    for name in ROUTERS:
        assert f"- **{name}** ({ROUTERS[name].paper}" in PAGE, name
    for kind in AROUND.values():
        assert f"`{kind.router.__name__}" in PAGE, kind
    for item in dataclasses.fields(RouterContext):
        assert f"`{item.name}`" in PAGE, item.name
    for item in dataclasses.fields(Needs):
        assert f"`{item.name}=" in PAGE, item.name
    assert "--router near:Near --router-options share=0.4" in PAGE


# The layer


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("backend", tuple(backends.BACKENDS))
def test_it_runs_on_every_backend(near: ModuleType, backend: str, dtype: torch.dtype) -> None:
    layer = layer_of(backend=backend, dtype=dtype)
    assert layer.router == near.Near(0.4)
    x_TD, grad_TD = (torch.randn(41, WIDTH).bfloat16().to(dtype) for _ in range(2))
    routing = layer.route(x_TD)
    assert 41 < routing.pairs < 41 * EXPERTS
    oracle.assert_all_close_enough(
        oracle.solve_layer(layer, x_TD, grad_TD),
        by_definition(layer, x_TD, grad_TD, dtype),
        by_definition(layer, x_TD, grad_TD, torch.float64),
        dtype=dtype,
    )


@pytest.mark.parametrize("policy", [*POLICIES, QUEUE])
def test_it_overflows_and_is_pinned_like_any_other(near: ModuleType, policy: str) -> None:
    layer = layer_of(capacity=Capacity(factor=0.8, policy=policy))
    x_TD, valid_T = torch.randn(60, WIDTH), torch.rand(60) > 0.2
    routing = layer.route(x_TD, valid_T=valid_T, seed=1)
    assert_well_formed(routing)
    again = layer.route(x_TD, valid_T=valid_T, pinned=routing.pinned(), seed=1)
    assert torch.equal(again.dense(), routing.dense())
    assert layer(x_TD).output.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "smooth_load"])
def test_every_loss_reaches_its_gate(near: ModuleType, name: str) -> None:
    """Except `smooth_load`, which is of a noisy router."""
    layer = layer_of(experts=6)
    routing = layer(torch.randn(48, WIDTH)).routing
    context = LossContext(k=2, sequences=2, groups=3, groups_kept=2)
    loss = LOSSES[name](routing, context)
    loss.backward()
    assert layer.gate is not None and layer.gate.weight.grad is not None
    assert bool(loss.isfinite()) and float(layer.gate.weight.grad.norm()) > 1e-6


def test_its_health_is_seen(near: ModuleType) -> None:
    layer = layer_of()
    routing: Routing = layer(torch.randn(50, WIDTH)).routing
    seen = health(routing)
    assert seen.counts_E.tolist() == routing.counts_E.tolist() and seen.tokens == 50
    assert seen.router_entropy is not None and 0 < seen.router_entropy < 1
    assert seen.router_z is not None and seen.near_tie_rate is not None


def test_wrappers_go_around_it(near: ModuleType) -> None:
    router = Explore(Tempered(near.Near(0.4), Schedule.constant(0.5)), Schedule.constant(1.0))
    layer, x_TD = layer_of(router=router), torch.randn(50, WIDTH)
    trained, tested = layer.route(x_TD, seed=1), layer.eval().route(x_TD)
    assert torch.equal(trained.mask_TE.sum(1), tested.mask_TE.sum(1))
    assert not torch.equal(trained.mask_TE, tested.mask_TE)


# By name


def test_by_name_with_options(near: ModuleType) -> None:
    assert routers.from_config(config()) == near.Near(0.4)
    assert routers.from_config(config(router_options=())) == near.Near()
    assert routers.options_of(own_kind(f"{NAME}:Near")) == {"share": 0.5}
    built = routers.from_config(config(temperature=2.0, router_gradient="dense"))
    assert built == routers.DenseMixer(Tempered(near.Near(0.4), Schedule.constant(2.0)))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"router": f"{NAME}:Far"}, "no dataclass 'Far'"),
        ({"router": f"{NAME}:require"}, "no dataclass 'require'"),
        ({"router": "not_there:Near"}, "'not_there' is not imported"),
        ({"router_options": ("width=3",)}, "no option 'width=3'"),
        ({"router_options": ("share",)}, "no option 'share'"),
        ({"router_options": ("share=much",)}, "share is 'much'; a float is wanted"),
        ({"router_options": ("share=2",)}, "share is 2.0"),
        ({"selection_bias": True}, "selection_bias is True"),
        ({"scale": 2.0}, "scale is 2.0"),
        ({"groups": 7, "group_score": "max", "groups_kept": 7}, "groups is 7"),
    ],
    ids=str,
)
def test_what_is_refused(near: ModuleType, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        routers.from_config(config(**changes))


def test_a_field_called_k_is_the_experts_per_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = example().replace("    share: float = 0.5", "    k: int\n    share: float = 0.5")
    (tmp_path / "near_with_k.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("near_with_k")
    assert routers.from_config(config(router="near_with_k:Near")) == module.Near(k=2, share=0.4)
    sys.modules.pop("near_with_k")


# In a model


def test_saved_and_loaded(near: ModuleType, tmp_path: Path) -> None:
    model = Transformer(tiny.config(moe=config(), layers=2))
    tiny.fill(model)
    tokens_BS = tiny.tokens(model, 2, 9)
    with torch.no_grad():
        expected = model.eval()(tokens_BS)
    model.save(tmp_path / "saved")
    loaded = moiety.load(tmp_path / "saved").eval()
    with torch.no_grad():
        output = loaded(tokens_BS)
    assert torch.equal(output.logits, expected.logits)
    assert [routing.pairs for routing in output.routing.values()] == [
        routing.pairs for routing in expected.routing.values()
    ]
    sys.modules.pop(NAME)
    with pytest.raises(ConfigError) as caught:
        moiety.load(tmp_path / "saved")
    assert f"router '{NAME}:Near' is code of your own" in str(caught.value)
    assert f"hint: in Python `import {NAME}` first" in str(caught.value)
    assert NAME not in sys.modules, "reading a file must not run code"
    import_own_routers(f"{NAME}:Near")
    with torch.no_grad():
        assert torch.equal(moiety.load(tmp_path / "saved").eval()(tokens_BS).logits, expected.logits)


def test_it_learns_in_a_model(near: ModuleType) -> None:
    model = Transformer(tiny.config(moe=config(), layers=2), checkpointing=True)
    tiny.fill(model)
    tokens_BS = tiny.tokens(model, 4, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    costs = []
    for step in range(12):
        output = model(tokens_BS, step=step, seed=step)
        logits_NV = output.logits[:, :-1].reshape(-1, 61)
        cost = torch.nn.functional.cross_entropy(logits_NV, tokens_BS[:, 1:].reshape(-1))
        for routing in output.routing.values():
            cost = cost + 0.01 * LOSSES["load"](routing, LossContext(k=2))
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        costs.append(float(cost.detach()))
    assert costs[-1] < 0.8 * costs[0]

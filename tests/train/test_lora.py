"""Adapters that learn: what is trained, what is not, and that a miss is an error with its name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moiety.errors import ConfigError, FormatError, TrainingError, UsageError
from moiety.formats.policy import policy_named
from moiety.model import checkpoint
from moiety.model.adapter_files import CONFIG, WEIGHTS, load_adapter, read_adapter, save_adapter
from moiety.model.adapters import attach, detach, places, routers
from moiety.model.transformer import Transformer
from moiety.moe.adapted import AdaptedExperts, AdaptedLinear, adapted_layers
from moiety.quant.quantize import quantize
from moiety.train.adapter_check import check_adapter, norms_of
from moiety.train.lora import LoraOptions, adapt, check, table
from moiety.train.optim import build_optimizer, set_learning_rate
from tests import tiny
from tests.model.test_adapters import adapters


def trained(model: Transformer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def steps(model: Transformer, count: int = 3, rate: float = 0.02) -> list[float]:
    """Losses of a few steps on the same tokens."""
    tokens = tiny.tokens(model, 2, 17)
    optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.95), router_scale=0.5)
    set_learning_rate(optimizer, rate)
    model.train()
    losses = []
    for _ in range(count):
        loss = model(tokens, seed=1).cross_entropy(tokens.roll(-1, 1)) / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("form", ["", "int4-g32", "nf4-g64"])
@pytest.mark.parametrize(
    "options",
    [
        LoraOptions(rank=2),
        LoraOptions(rank=2, share_a=True, targets=("experts",)),
        LoraOptions(rank=3, expert_rank=1, rslora=True, targets=("all",), router=True),
        LoraOptions(targets=("attention.q", "attention.v", "shared.up"), layers=(1, 2)),
    ],
)
def test_adapters_learn_and_nothing_else_moves(options: LoraOptions, form: str) -> None:
    torch.manual_seed(0)
    model = tiny.model("shared")
    if form:
        quantize(model, policy_named(form))
    before = copy.deepcopy(model.state_dict())
    tokens = tiny.tokens(model, 2, 9)
    with torch.no_grad():
        answer = model.eval()(tokens).logits
    adapt(model, options)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, answer, rtol=1e-2 if form else 1e-6, atol=3e-2 if form else 1e-6
        )
    routed = set(routers(model))
    wanted = {name for name in dict(model.named_parameters()) if ".adapters." in name}
    assert trained(model) == wanted | (routed if options.router else set())
    losses = steps(model, 6)
    assert losses[-1] < losses[0] - 0.02, losses
    moved = {name for name, value in base_state(model).items() if not torch.equal(value, before[name])}
    assert moved == (routed if options.router else set())


def base_state(model: Transformer) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base.", "."): value
        for name, value in model.state_dict().items()
        if ".adapters." not in name
    }


def test_what_is_trained_is_counted_by_part() -> None:
    model = tiny.model("shared")
    plain = sum(parameter.numel() for parameter in model.parameters())
    rows = {
        row["group"]: row
        for row in adapt(model, LoraOptions(rank=2, targets=("attention", "experts.down"), router=True))
    }
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert rows["all"]["parameters"] == plain and rows["all"]["trained"] == learning
    d, f, e = 20, 14, 5
    qkv = 3 * 2 * d + 2 * (24 + 6 + 6)
    assert rows["attention"]["trained"] == 3 * (qkv + 2 * 24 + 2 * d)
    assert rows["experts"]["trained"] == 3 * e * 2 * (d + f)
    assert rows["router"]["trained"] == rows["router"]["parameters"] == 3 * (e * d + d)
    assert rows["shared"]["trained"] == rows["embedding"]["trained"] == rows["norm"]["trained"] == 0
    packed = tiny.model("shared")
    quantize(packed, policy_named("int4-g32"))
    assert {row["group"]: row["parameters"] for row in table(packed)} == {
        group: row["parameters"] for group, row in rows.items()
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"targets": ("experts", "q_proj")}, "q_proj"),
        ({"targets": ("dense",)}, "dense"),
        ({"targets": ("attention.q_a",)}, "attention.q_a"),
        ({"layers": (7,)}, "7"),
        ({"targets": ("head",)}, "head"),
    ],
)
def test_a_target_that_is_nowhere_is_named(options: dict[str, Any], named: str) -> None:
    model = tiny.model("mixtral")
    if options.get("targets") == ("head",):
        model = tiny.model("llama")  # tied: its head is the embedding
    with pytest.raises(ConfigError, match=named):
        adapt(model, LoraOptions(**options))
    assert not list(adapted_layers(model))


def test_a_planted_miss_is_named() -> None:
    options = LoraOptions(rank=2, targets=("attention", "experts"))
    model = tiny.model("mixtral")
    adapt(model, options)
    check(model, options)
    layer = model.get_submodule("blocks.1.feed_forward.experts")
    assert isinstance(layer, AdaptedExperts)
    down = layer.leaves("default")["down"]
    down.b.requires_grad_(False)
    with pytest.raises(
        TrainingError, match=r"blocks\.1\.feed_forward\.experts\.down has an adapter whose b will not"
    ):
        check(model, options)
    down.b = nn.Parameter(down.b[:-1])
    with pytest.raises(TrainingError, match="for 4 of 5 experts"):
        check(model, options)
    del layer.adapters["default"]
    with pytest.raises(TrainingError, match=r"experts\.gate_up was to be adapted"):
        check(model, options)
    router = next(iter(routers(model).values()))
    with pytest.raises(TrainingError, match="trained, against"):
        router.requires_grad_()
        detach(model, "default")
        adapt(model, options)
        router.requires_grad_()
        check(model, options)


@pytest.mark.parametrize("layout", ["fused", "linears"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "shared", "relu", "sigmoid", "llama"])
def test_saved_and_loaded_it_is_the_same(name: str, layout: Any, tmp_path: Path) -> None:
    model = tiny.model(name).eval()
    other = tiny.clone(model).eval()
    attach(model, "one", adapters(model))
    save_adapter(model, tmp_path / "adapter", "one", experts=layout)
    load_adapter(other, tmp_path / "adapter", "two")
    tokens = tiny.tokens(model, 2, 11)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_trained_routers_travel_with_it(tmp_path: Path) -> None:
    model = tiny.model("sigmoid")
    other = tiny.clone(model)
    adapt(model, LoraOptions(rank=2, router=True))
    steps(model)
    save_adapter(model, tmp_path / "adapter")
    read = load_adapter(other, tmp_path / "adapter")
    assert any("gate.weight" in own for own in read.routers) and any(
        "selection_bias" in own for own in read.routers
    )
    tokens = tiny.tokens(model, 2, 11)
    with torch.no_grad():
        torch.testing.assert_close(
            other.eval()(tokens).logits, model.eval()(tokens).logits, rtol=1e-5, atol=1e-5
        )
    with pytest.raises(UsageError, match="has routers of its own"):
        load_adapter(other, tmp_path / "adapter", "again")


def edit(folder: Path, **changes: Any) -> None:
    """Change an adapter's config, or with `drop` and `add` its tensors."""
    drop, add = changes.pop("drop", ""), changes.pop("add", {})
    tensors = checkpoint.read_tensors(folder / WEIGHTS)
    kept = {key: one for key, one in tensors.items() if not drop or drop not in key} | add
    config = json.loads((folder / CONFIG).read_text()) | changes
    for file in (*folder.iterdir(),):
        file.unlink()
    (folder / CONFIG).write_text(json.dumps(config))
    entries = {key: checkpoint.Entry(tuple(one.shape), one.dtype, one.clone) for key, one in kept.items()}
    checkpoint.write_tensors(folder / WEIGHTS, entries)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        (
            {"drop": "layers.2.mlp.experts.3"},
            FormatError,
            r"lacks experts \[3\] of blocks\.2\.feed_forward\.experts",
        ),
        (
            {"drop": "layers.2.self_attn.v_proj"},
            FormatError,
            r"names model\.layers\.2\.self_attn\.v_proj as adapted",
        ),
        ({"drop": "layers.2.self_attn.v_proj.lora_B"}, FormatError, "lora_A without lora_B"),
        ({"drop": "layers.2"}, FormatError, r"layers\.2"),
        (
            {"add": {"base_model.model.model.layers.0.extra.lora_A.weight": torch.ones(2, 2)}},
            FormatError,
            "extra",
        ),
        ({"use_dora": True}, ConfigError, "use_dora"),
        ({"bias": "all"}, ConfigError, "bias"),
        ({"peft_type": "IA3"}, ConfigError, "peft_type"),
        ({"r": 0}, FormatError, "r 0"),
        ({"lora_alpha": "x"}, FormatError, "lora_alpha"),
        ({"drop": "model"}, FormatError, "nothing for this model"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(
    changes: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    model = tiny.model("qwen3_moe")
    attach(model, "one", adapters(model))
    save_adapter(model, tmp_path / "adapter", "one", experts="linears")
    detach(model, "one")
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(error, match=named):
        read_adapter(model, tmp_path / "adapter")


def test_another_model_of_the_same_names_is_refused(tmp_path: Path) -> None:
    model = tiny.model("mixtral")
    attach(model, "one", adapters(model))
    save_adapter(model, tmp_path / "adapter", "one")
    with pytest.raises(FormatError, match="wanted are"):
        read_adapter(tiny.model("", moe=tiny.experts(experts=6), d_ff=14), tmp_path / "adapter")
    with pytest.raises(UsageError, match="a checkpoint has none"):
        checkpoint.save(model, tmp_path / "model")
    with pytest.raises(UsageError, match="has the adapter one"):
        quantize(model, policy_named("int4-g32"))


def test_what_acts_and_what_does_not() -> None:
    from moiety.model.adapter_files import Read

    model = tiny.model("mixtral").eval()
    tokens, made = tiny.tokens(model, 2, 12), adapters(model)
    whole = check_adapter(copy.deepcopy(model), Read(adapters=copy.deepcopy(made)), tokens)
    assert (
        whole.acts == "whole"
        and whole.moved > 0.05
        and whole.kl > 0
        and len(whole.additions) == 3 * (2 * 5 + 2) + 1
    )
    shares: dict[int | None, float] = {}
    for one in whole.additions:
        if one.group == "experts" and one.parameter.endswith("down"):
            shares[one.layer] = shares.get(one.layer, 0.0) + one.tokens
    assert shares == {layer: pytest.approx(1.0) for layer in range(3)}
    made["blocks.2.feed_forward.experts", "down"].b.data[3].zero_()
    part = check_adapter(copy.deepcopy(model), Read(adapters=copy.deepcopy(made)), tokens)
    assert part.acts == "part" and [(one.parameter, one.expert) for one in part.idle] == [
        ("blocks.2.feed_forward.experts.down", 3)
    ]
    for one in made.values():
        one.b.data.zero_()
    assert check_adapter(copy.deepcopy(model), Read(adapters=made), tokens).acts == "nothing"


def test_norms_are_those_of_the_product() -> None:
    model = tiny.model("qwen3_moe")
    made = adapters(model)
    for place in places(model):
        lora = made[place.path, place.leaf].lora(torch.float32)
        torch.testing.assert_close(
            norms_of(lora),
            lora.dense(place.rows).flatten(1).norm(dim=1),
            rtol=1e-5,
            atol=1e-6,
            check_dtype=False,
        )


def test_memory_of_packed_training_holds_no_dense_stack() -> None:
    """The largest tensor that training with packed experts makes is one matrix, not the stack of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, torch.Tensor) and one.is_floating_point():
                    self.elements = max(self.elements, one.numel())
            return out

    experts, d, f = 16, 64, 48
    moe = tiny.experts(experts=experts, d_ff=f)
    model = tiny.model("", d_model=d, moe=moe, d_ff=f, layers=1, vocab_size=61)
    quantize(model, policy_named("int4-g32"))
    adapt(model, LoraOptions(rank=1, targets=("experts",)))
    tokens = tiny.tokens(model, 1, 12)
    with Largest() as seen:
        model.train()(tokens).cross_entropy(tokens).backward()
    assert 0 < seen.elements <= 2 * f * d < experts * f * d
    assert isinstance(model.get_submodule("blocks.0.feed_forward.experts"), AdaptedExperts)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())

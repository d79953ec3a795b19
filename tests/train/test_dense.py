"""Experts averaged into one feed-forward: exact where they are equal, the weighted mean where not, and said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moiety.errors import CheckFailed, ConfigError
from moiety.model import checkpoint
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.train.data import Batch, TokenData
from moiety.train.dense import RECEIPT, dense
from moiety.train.expert_options import UpcycleOptions
from moiety.train.options import TrainOptions
from moiety.train.upcycle import upcycle
from tests import tiny
from tests.train.tiny import text as tiny_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenData, Tokenizer]:
    return tiny_text(tmp_path_factory.mktemp("text"))


def batches(data: TokenData) -> list[Batch]:
    return [one for domain in data.domains for one in data.evaluation(domain, B=2, S=24, limit=3)]


def saved(folder: Path, tokenizer: Tokenizer, **changes: Any) -> tuple[Path, Transformer]:
    torch.manual_seed(0)
    model = tiny.model("", vocab_size=tokenizer.vocab_size, **changes).eval()
    checkpoint.save(model, folder / "model", tokenizer=tokenizer)
    return folder / "model", model


@pytest.mark.parametrize("shared", ["none", "plain", "gated"])
def test_a_copied_parent_comes_back_from_its_experts(
    tmp_path: Path, text: tuple[TokenData, Tokenizer], shared: Any
) -> None:
    place, model = saved(tmp_path, text[1], d_ff=24, feed_forward_bias=shared == "none")
    upcycle([place], tmp_path / "moe", UpcycleOptions(experts=4, layers="0,2", shared=shared))
    receipt = dense(tmp_path / "moe", tmp_path / "dense", batches(text[0]))
    assert abs(receipt.loss_after - receipt.loss_before) < 1e-4
    assert receipt.loss_averaged == pytest.approx(receipt.loss_after, abs=1e-6)
    back = checkpoint.load(tmp_path / "dense")
    tokens = torch.randint(60, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)
    assert back.config.d_ff == (24 if shared == "none" else 48)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "dense" / "tokenizer.json").is_file()


def test_the_mean_goes_by_combine_weights_and_the_loss_is_told(
    tmp_path: Path, text: tuple[TokenData, Tokenizer]
) -> None:
    moe = tiny.experts(shared_d_ff=18, shared_gate=True, scale=1.5, renormalize=False)
    place, model = saved(tmp_path, text[1], moe=moe, d_ff=40, dense_layers=(1,))
    found = batches(text[0])
    receipt = dense(place, tmp_path / "dense", found)
    assert math.isfinite(receipt.loss_before) and receipt.loss_after != receipt.loss_before
    weight_E, gates, tokens, nats = torch.zeros(5), [], 0, 0.0
    layer = model.blocks[2].feed_forward
    layer.register_forward_hook(lambda module, given, _: gates.append(module.shared_gate(given[0]).sigmoid()))
    with torch.no_grad():
        for one in found:
            output = model(one.tokens_BS)
            nats += float(output.cross_entropy(one.targets_BS))
            for expert in range(5):
                start = int(output.routing[2].counts_E[:expert].sum())
                stop = start + int(output.routing[2].counts_E[expert])
                weight_E[expert] += output.routing[2].weight_N[start:stop].sum()
            tokens += one.tokens_BS.numel()
    weight_E /= tokens
    assert receipt.loss_before == pytest.approx(nats / receipt.tokens, rel=1e-5)
    torch.testing.assert_close(torch.tensor(receipt.weight_LE[1]), weight_E, rtol=1e-4, atol=1e-6)
    made = checkpoint.load(tmp_path / "dense").blocks[2].feed_forward
    share = (weight_E / weight_E.sum())[:, None, None]
    down = (weight_E[:, None, None] * layer.experts.down).sum(0)
    shared = layer.shared.down * torch.cat([one.flatten() for one in gates]).mean()
    wanted = F.pad(torch.cat([down, shared], dim=1), (0, 40 - 14 - 18))
    torch.testing.assert_close(made.down, wanted, rtol=1e-4, atol=1e-5)
    gate = (share * layer.experts.gate_up).sum(0)[:14]
    torch.testing.assert_close(made.gate_up[:14], gate, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        made.gate_up[40 + 14 : 40 + 32], layer.shared.gate_up[18:], rtol=1e-5, atol=1e-6
    )
    assert not made.gate_up[32:40].any() and not made.gate_up[72:].any()


def test_distillation_brings_the_average_nearer(tmp_path: Path, text: tuple[TokenData, Tokenizer]) -> None:
    place, _ = saved(tmp_path, text[1], moe=tiny.experts(), d_ff=14)
    words = [str(path) for path in _texts(tmp_path)]
    options = TrainOptions(steps=30, batch=4, length=24, learning_rate=1e-2, warmup=3, evaluate_every=0)
    receipt = dense(place, tmp_path / "dense", batches(text[0]), texts=words, distill=options)
    assert receipt.steps == 30 and receipt.loss_after != receipt.loss_averaged
    teacher, student = checkpoint.load(place), checkpoint.load(tmp_path / "dense")
    dense(place, tmp_path / "average", batches(text[0]))
    with torch.no_grad():
        one = batches(text[0])[0]
        far, near = (
            float(model(one.tokens_BS).divergence(teacher(one.tokens_BS), one.targets_BS))
            for model in (checkpoint.load(tmp_path / "average"), student)
        )
    assert near < 0.7 * far
    assert json.loads((tmp_path / "dense" / RECEIPT).read_text())["steps"] == 30


def _texts(folder: Path) -> list[Path]:
    from tests.train.tiny import documents

    (folder / "words.jsonl").write_text(
        "\n".join(json.dumps({"text": one.text, "domain": one.domain}) for one in documents())
    )
    return [folder / "words.jsonl"]


def test_divergence_is_that_of_the_definition_with_its_gradient() -> None:
    torch.manual_seed(0)
    one, other = tiny.model("llama").double(), tiny.model("llama").double()
    tokens, targets = torch.randint(61, (2, 9)), torch.randint(61, (2, 9))
    targets[0, 4:] = -100
    found = one(tokens).divergence(other(tokens), targets)
    found.backward()  # type: ignore[no-untyped-call]
    grads = {
        name: parameter.grad.clone()
        for name, parameter in one.named_parameters()
        if parameter.grad is not None
    }
    one.zero_grad()
    with torch.no_grad():
        wanted = other(tokens).logits.log_softmax(-1)[targets != -100]
    true = F.kl_div(
        one(tokens).logits.log_softmax(-1)[targets != -100], wanted, log_target=True, reduction="sum"
    )
    true.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-6)
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "dense already"),
        ({"moe": tiny.experts(activation="clamped_swiglu", bias=True)}, "no average"),
        ({"moe": tiny.experts(null_experts=1)}, "no average"),
        ({"moe": tiny.experts(), "dense_layers": (0,), "activation": "relu"}, "another activation"),
    ],
)
def test_what_has_no_average_is_refused(
    tmp_path: Path, text: tuple[TokenData, Tokenizer], changes: dict[str, Any], said: str
) -> None:
    place, _ = saved(tmp_path, text[1], **changes)
    with pytest.raises(ConfigError, match=said):
        dense(place, tmp_path / "dense", batches(text[0]))
    assert not (tmp_path / "dense").exists()


def test_a_loss_that_is_no_number_leaves_nothing(tmp_path: Path, text: tuple[TokenData, Tokenizer]) -> None:
    place, model = saved(tmp_path, text[1], moe=tiny.experts(), d_ff=14)
    model.norm.weight.data[0] = float("inf")
    checkpoint.save(model, place, tokenizer=text[1])
    with pytest.raises(CheckFailed, match="not finite"):
        dense(place, tmp_path / "dense", batches(text[0]))
    assert not (tmp_path / "dense").exists()

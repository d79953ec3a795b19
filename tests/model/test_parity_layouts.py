"""Files of other layouts, models where transformers departs from their authors, and Grok-1 by its formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiety.errors import FormatError
from moiety.model import checkpoint
from moiety.model.families import FAMILIES
from moiety.model.transformer import Transformer
from tests.families import FAMILY_SETTINGS, random_settings
from tests.model.test_parity import MATCH, POSITIONS, assert_near, fill, their_model


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("name", FAMILY_SETTINGS)
def test_names_of_modules_in_memory(name: str, tmp_path: Path) -> None:
    """A file of `model.state_dict()`: fused experts, new names, the tied head a second time."""
    torch.manual_seed(100)
    settings = random_settings(name, 100)
    theirs = their_model(name, settings)
    theirs.config.save_pretrained(tmp_path)
    state = {key: tensor.contiguous().clone() for key, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    ours = checkpoint.load(tmp_path, match=MATCH.get(name, "original")).eval()
    tokens = torch.randint(settings["vocab_size"], (2, POSITIONS))
    assert_near(logits(ours, tokens), logits(theirs, tokens), name)


def rewritten(
    folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> None:
    """Replace keys of config.json, and the tensors where there are any."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")


def test_the_text_model_of_llama_4(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = random_settings("llama4_text", 0)
    theirs = their_model("llama4_text", settings)
    theirs.save_pretrained(tmp_path)
    inner = json.loads((tmp_path / "config.json").read_text())
    state = {
        f"language_model.{name}": part for name, part in load_file(tmp_path / "model.safetensors").items()
    }
    whole = {"model_type": "llama4", "text_config": inner, "vision_config": {"hidden_size": 3}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file(state, tmp_path / "model.safetensors")
    tokens = torch.randint(settings["vocab_size"], (2, POSITIONS))
    assert_near(logits(checkpoint.load(tmp_path), tokens), logits(theirs, tokens), "text model")
    save_file({**state, "vision_model.class_embedding": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="vision_model"):
        checkpoint.load(tmp_path)


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings = random_settings("deepseek_v3", 1)
    theirs = their_model("deepseek_v3", settings)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    last, after = (
        f"model.layers.{settings['num_hidden_layers'] - 1}.",
        f"model.layers.{settings['num_hidden_layers']}.",
    )
    more = {
        after + name.removeprefix(last): part.clone() for name, part in state.items() if name.startswith(last)
    }
    rewritten(tmp_path, {"num_nextn_predict_layers": 1, "model_type": "kimi_k2"}, {**state, **more})
    with pytest.raises(FormatError, match=r"layers\.\d"):
        checkpoint.load(tmp_path)
    rewritten(tmp_path, {}, {**state, **more, f"{after}eh_proj.weight": torch.ones(3, 3)})
    tokens = torch.randint(settings["vocab_size"], (2, POSITIONS))
    assert_near(logits(checkpoint.load(tmp_path), tokens), logits(theirs, tokens), "without prediction")


def test_dbrx_rotates_as_its_authors_or_as_transformers(tmp_path: Path) -> None:
    torch.manual_seed(2)
    settings = {**random_settings("dbrx", 2), "rope_theta": 10_000.0}
    settings["attn_config"] = {**settings["attn_config"], "rope_theta": 70.0}
    theirs = their_model("dbrx", settings)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(settings["vocab_size"], (1, POSITIONS))
    wanted = logits(theirs, tokens)
    assert_near(logits(checkpoint.load(tmp_path, match="hf"), tokens), wanted, "as transformers")
    ours = logits(checkpoint.load(tmp_path), tokens)
    assert float((ours - wanted).abs().max()) > 1e-2
    as_authors = their_model("dbrx", {**settings, "rope_theta": 70.0})
    as_authors.load_state_dict(theirs.state_dict())
    assert_near(ours, logits(as_authors, tokens), "as its authors")


def test_phi_uses_long_factors_or_not(tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = random_settings("phimoe", 4)
    pairs = (settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]) // 2
    rope = {
        "rope_type": "longrope", "rope_theta": 300.0, "short_mscale": 1.1, "long_mscale": 1.3,
        "short_factor": [1.0] * pairs, "long_factor": [3.0] * pairs, "original_max_position_embeddings": 13,
    }  # fmt: skip
    theirs = their_model("phimoe", {**settings, "rope_parameters": rope})
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(settings["vocab_size"], (1, POSITIONS))
    wanted = logits(theirs, tokens)
    original, as_theirs = checkpoint.load(tmp_path), checkpoint.load(tmp_path, match="hf")
    assert_near(logits(as_theirs, tokens), wanted, "as transformers")
    assert float((logits(original, tokens) - wanted).abs().max()) > 1e-2
    short = tokens[:, :13]  # within the first context both are one
    assert_near(logits(original, short), logits(theirs, short), "short")
    long = their_model("phimoe", {**settings, "rope_parameters": {**rope, "short_factor": [3.0] * pairs}})
    long.load_state_dict(theirs.state_dict())
    assert_near(logits(original, tokens), logits(long, tokens), "long factors")


def test_deepseek_v2_divides_weights_or_not(tmp_path: Path) -> None:
    torch.manual_seed(5)
    settings = {**random_settings("deepseek_v2", 5), "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    theirs = their_model("deepseek_v2", settings)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(settings["vocab_size"], (1, POSITIONS))
    assert_near(
        logits(checkpoint.load(tmp_path, match="hf"), tokens), logits(theirs, tokens), "as transformers"
    )
    moe = checkpoint.load_config(tmp_path).moe
    assert moe is not None and moe.renormalize and moe.scale == 1.0


GROK: dict[str, Any] = {
    "model_type": "grok-1", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 13, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2,
    "attn_output_multiplier": 0.3, "max_attn_value": 1.5, "embedding_multiplier_scale": 3.0,
    "output_multiplier_scale": 0.57, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def grok(state: dict[str, Tensor], tokens_S: Tensor, approximate: str) -> Tensor:
    """Grok-1 token by token and head by head, from the structure that xAI published (github xai-org/grok-1)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return state[name] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
        )

    x_SD = state["model.embed_tokens.weight"][tokens_S] * GROK["embedding_multiplier_scale"]
    past = torch.ones(len(x_SD), len(x_SD)).tril().bool()
    for layer in range(GROK["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x_SD, f"{at}pre_attn_norm.scale")
        heads = []
        for head in range(4):
            q, k, v = (
                (h @ state[f"{at}attn.{part}_proj.weight"].T)[:, 6 * number : 6 * number + 6]
                for part, number in (("q", head), ("k", head // 2), ("v", head // 2))
            )
            scores = turn(q) @ turn(k).T * GROK["attn_output_multiplier"]
            scores = GROK["max_attn_value"] * (scores / GROK["max_attn_value"]).tanh()
            heads.append(scores.masked_fill(~past, -math.inf).softmax(-1) @ v)
        y = torch.cat(heads, -1) @ state[f"{at}attn.o_proj.weight"].T
        x_SD = x_SD + norm(y, f"{at}post_attn_norm.scale")
        h = norm(x_SD, f"{at}pre_moe_norm.scale")
        weight, chosen = (h @ state[f"{at}moe_block.gate.weight"].T).softmax(-1).topk(2)
        y = torch.zeros_like(h)
        for token in range(len(h)):
            for share, expert in zip(weight[token], chosen[token].tolist(), strict=True):
                one = f"{at}moe_block.experts.{expert}."
                gate = F.gelu(h[token] @ state[f"{one}linear.weight"].T, approximate=approximate)
                inner = gate * (h[token] @ state[f"{one}linear_v.weight"].T)
                y[token] += share * (inner @ state[f"{one}linear_1.weight"].T)
        x_SD = x_SD + norm(y, f"{at}post_moe_norm.scale")
    return (
        norm(x_SD, "model.norm.scale")
        @ state["model.embed_tokens.weight"].T
        * GROK["output_multiplier_scale"]
    )


@pytest.mark.parametrize(("match", "approximate"), [("original", "tanh"), ("hf", "none")])
def test_grok_1(match: Any, approximate: str, tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = Transformer(FAMILIES["grok-1"].read(GROK, match=match)).eval()
    fill(model)
    choice = checkpoint.save(model, tmp_path / "grok")
    assert choice.family.model_type == "grok-1"
    state = load_file(tmp_path / "grok" / "model.safetensors")
    tokens = torch.randint(GROK["vocab_size"], (1, POSITIONS))
    wanted = grok(state, tokens[0], approximate)[None]
    assert_near(logits(model, tokens), wanted, "grok")
    again = checkpoint.load(tmp_path / "grok")
    assert again.config == model.config and torch.equal(logits(again, tokens), logits(model, tokens))
    folder = (
        tmp_path / "port"
    )  # other ports say weight for scale, store the head too, and leave the activation out
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GROK))
    renamed = {name.replace("norm.scale", "norm.weight"): part for name, part in state.items()}
    save_file(
        {**renamed, "lm_head.weight": state["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
    )
    assert_near(logits(checkpoint.load(folder, match=match), tokens), wanted, "port")


@pytest.mark.parametrize("name", FAMILY_SETTINGS)
def test_old_spelling_of_rotary_positions(name: str) -> None:
    """`rope_theta` and `rope_scaling`, as files from before transformers 5 have them, say the same."""
    for seed in range(6):
        config = transformers.AutoConfig.for_model(name, **random_settings(name, seed))
        values = {**json.loads(config.to_json_string(use_diff=False)), "model_type": name}
        new = FAMILIES[name].read(values)
        parameters = values.pop("rope_parameters")
        old = {
            key: parameters.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in parameters
        }
        kind = parameters.pop("rope_type")
        if kind != "default" or name == "gpt_oss":  # whose own default is not the plain one
            old["rope_scaling"] = {"type": kind, **parameters}
        assert FAMILIES[name].read({**values, **old}) == new, (seed, old)

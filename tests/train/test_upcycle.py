"""Dense models made into experts: what is promised is kept, and what breaks a promise is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import moiety
from moiety.config import AttentionConfig, ModelConfig
from moiety.errors import CheckFailed, ConfigError, StorageError, UsageError
from moiety.model import checkpoint
from moiety.moe.upcycle import Cut, expert_tensor
from moiety.storage import verify
from moiety.train import upcycle as module
from moiety.train.expert_options import UpcycleOptions
from moiety.train.upcycle import RECEIPT, upcycle
from tests import tiny
from tests.train.tiny import text as tiny_text

PARENTS: dict[str, ModelConfig] = {
    "llama": tiny.config(d_ff=24, attention=tiny.attention(heads=5, kv_heads=1), tied=True),
    "mistral": tiny.config(d_ff=24, attention=tiny.attention(window=5)),
    "qwen2": tiny.config(d_ff=24, attention=tiny.attention(qkv_bias=True)),
    "qwen3": tiny.config(d_ff=24, attention=tiny.attention(qk_norm="head")),
    "full_norm": tiny.config(d_ff=24, d_model=24, attention=tiny.attention(qk_norm="full")),
    "biases": tiny.config(d_ff=24, feed_forward_bias=True),
    "relu": tiny.config(d_ff=24, feed_forward_bias=True, gated=False, activation="relu"),
}
EXACT: dict[str, dict[str, Any]] = {
    "copy": {"experts": 4, "top_k": 2},
    "copy, one": {"experts": 3, "top_k": 1, "router": "zeros"},
    "copy, all": {"experts": 3, "top_k": 3, "renormalize": False},
    "split, all": {"experts": 4, "top_k": 4, "method": "split", "renormalize": False},
    "split, all, zeros": {"experts": 4, "top_k": 4, "method": "split", "router": "zeros"},
    "split, copies": {"experts": 8, "top_k": 4, "method": "split", "slices": 2},
    "split, kmeans": {"experts": 12, "top_k": 3, "method": "split", "slices": 3, "router": "kmeans"},
    "kmeans": {"experts": 4, "top_k": 2, "router": "kmeans"},
    "shared": {"experts": 4, "top_k": 2, "shared": "plain", "method": "drop", "noise": 0.1},
    "shared, gated": {"experts": 4, "top_k": 2, "shared": "gated", "method": "split", "slices": 2},
}
CHANGED: dict[str, dict[str, Any]] = {
    "drop": {"method": "drop", "drop": 0.5},
    "noise": {"noise": 0.05},
    "sum below 1": {"renormalize": False},
    "half a copy": {"method": "split", "slices": 4},
    "ties": {"method": "split", "slices": 2, "router": "zeros"},
}


def saved(folder: Path, name: str = "llama", seed: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    checkpoint.save(tiny.model("", **dataclasses_values(PARENTS[name])), folder / f"{name}{seed}", **options)
    return folder / f"{name}{seed}"


def dataclasses_values(config: ModelConfig) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}


def some_tokens() -> Tensor:
    return torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(3))


def logits(path: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return checkpoint.load(path)(tokens).logits


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_keep_the_function(tmp_path: Path, name: str, method: str) -> None:
    parent, child = saved(tmp_path, name), tmp_path / "child"
    receipt = upcycle([parent], child, UpcycleOptions(**EXACT[method]), tokens_BS=some_tokens())
    assert receipt.promised and receipt.exact_delta is not None
    assert receipt.exact_delta < (2e-6 if EXACT[method].get("slices") == 3 else 1e-12)  # 3 x is not a float32
    assert 0 < receipt.floor < 1e-4 and receipt.delta[0] < 1e-4
    assert receipt.tokens == (2 * 20, 2 * 20) and receipt.layers == (0, 1, 2)
    assert json.loads((child / RECEIPT).read_text())["delta"] == [receipt.delta[0]]
    tokens = torch.randint(61, (2, 30))
    torch.testing.assert_close(logits(child, tokens), logits(parent, tokens), rtol=0, atol=1e-4)
    verify(child)
    model = checkpoint.load(child)
    assert sum(one.numel() for one in model.parameters()) == receipt.total_after > receipt.total_before


@pytest.mark.parametrize(
    ("name", "options", "family"),
    [
        ("llama", {}, "mixtral"),
        ("mistral", {"method": "split", "slices": 2}, "mixtral"),
        ("qwen3", {"layers": "every:2"}, "qwen3_moe"),
        ("qwen3", {"method": "split", "slices": 2, "layers": "0,2"}, "qwen3_moe"),
        ("qwen2", {"shared": "gated"}, "qwen2_moe"),
        ("full_norm", {}, "olmoe"),
        ("full_norm", {"method": "drop"}, "olmoe"),
    ],
)
def test_transformers_loads_the_child_and_agrees(
    tmp_path: Path, name: str, options: dict[str, Any], family: str
) -> None:
    parent, child = saved(tmp_path, name), tmp_path / "child"
    upcycle([parent], child, UpcycleOptions(experts=4, top_k=2, **options))
    assert json.loads((child / "config.json").read_text())["model_type"] == family
    twin = transformers.AutoModelForCausalLM.from_pretrained(child, dtype=torch.float32, **tiny.EAGER).eval()
    tokens = torch.randint(61, (2, 30))
    with torch.no_grad():
        theirs = twin(tokens).logits
    torch.testing.assert_close(logits(child, tokens), theirs, rtol=1e-4, atol=1e-4)
    if options.get("method") != "drop":
        torch.testing.assert_close(theirs, logits(parent, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CHANGED)
def test_methods_that_change_the_function_say_so_and_by_how_much(tmp_path: Path, method: str) -> None:
    parent = saved(tmp_path)
    options = UpcycleOptions(experts=4, top_k=2, **CHANGED[method])
    receipt = upcycle([parent], tmp_path / "child", options)
    assert (
        not receipt.promised
        and receipt.exact_delta is None
        and receipt.tokens == (2 * module.POSITIONS, 0)
        and receipt.text_delta == ()
    )
    if method != "ties":  # our own router takes the lower of equal experts
        assert receipt.delta[0] > 0.01
    tokens = torch.randint(61, (2, 30))
    assert (logits(tmp_path / "child", tokens) - logits(parent, tokens)).abs().max() < 1000


def unscaled(dense: Tensor, leaf: str, cut: Cut, *, layer: int, expert: int) -> Tensor:
    made = expert_tensor(dense, leaf, cut, layer=layer, expert=expert)
    return made / cut.slices if leaf == "down" else made


def one_column_lost(dense: Tensor, leaf: str, cut: Cut, *, layer: int, expert: int) -> Tensor:
    made = expert_tensor(dense, leaf, cut, layer=layer, expert=expert).clone()
    if leaf == "down" and layer == 2 and expert % 2:
        made[:, 0] = 0
    return made


def gate_is_up(dense: Tensor, leaf: str, cut: Cut, *, layer: int, expert: int) -> Tensor:
    made = expert_tensor(dense, leaf, cut, layer=layer, expert=expert)
    return torch.cat(made.chunk(2)[::-1]) if leaf == "gate_up" else made


def wrong_slice(dense: Tensor, leaf: str, cut: Cut, *, layer: int, expert: int) -> Tensor:
    return expert_tensor(dense, leaf, cut, layer=layer, expert=expert // cut.slices)


@pytest.mark.parametrize("bug", [unscaled, one_column_lost, gate_is_up, wrong_slice])
def test_a_broken_promise_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: Callable[..., Tensor]
) -> None:
    parent = saved(tmp_path)
    monkeypatch.setattr(module, "expert_tensor", bug)
    with pytest.raises(CheckFailed, match="promises the parent's function") as caught:
        upcycle([parent], tmp_path / "child", UpcycleOptions(experts=4, top_k=2, method="split", slices=2))
    assert caught.value.exit_code == 4
    assert [one.name for one in tmp_path.iterdir()] == [parent.name]


def test_routers_of_slices_that_differ_break_the_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = saved(tmp_path)
    monkeypatch.setattr(
        module,
        "_routers",
        lambda parent, config, options, tokens: dict.fromkeys(range(3), torch.randn(4, 20)),
    )
    with pytest.raises(CheckFailed):
        upcycle([parent], tmp_path / "child", UpcycleOptions(experts=4, top_k=2, method="split", slices=2))


def test_a_parent_that_is_not_finite_is_refused_even_without_a_promise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parent = tiny.model("", d_ff=24)
    parent.blocks[1].feed_forward.down.data[0, 0] = float("nan")
    checkpoint.save(parent, tmp_path / "parent")
    with pytest.raises(CheckFailed, match="not finite"):
        upcycle([tmp_path / "parent"], tmp_path / "child", UpcycleOptions(experts=4, method="drop"))
    assert not (tmp_path / "child").exists()


def test_in_few_bits_the_promise_is_about_the_parent_in_as_few(tmp_path: Path) -> None:
    parent = saved(tmp_path)
    receipt = upcycle([parent], tmp_path / "child", UpcycleOptions(experts=4), dtype=torch.bfloat16)
    assert receipt.dtype == "bfloat16" and receipt.promised and receipt.delta[0] < 1e-4
    thirds = UpcycleOptions(experts=3, top_k=3, method="split")
    with pytest.raises(CheckFailed, match="fp32"):  # 3 x is not a bfloat16
        upcycle([parent], tmp_path / "thirds", thirds, dtype=torch.bfloat16)


def test_shards_change_nothing(tmp_path: Path) -> None:
    parent = saved(tmp_path)
    torch.manual_seed(0)
    checkpoint.save(
        tiny.model("", **dataclasses_values(PARENTS["llama"])), tmp_path / "sharded", max_shard_bytes=3000
    )
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 3
    options = UpcycleOptions(experts=4, top_k=2, method="drop", router="kmeans")
    one = upcycle([parent], tmp_path / "one", options, tokens_BS=some_tokens())
    other = upcycle(
        [tmp_path / "sharded"], tmp_path / "other", options, tokens_BS=some_tokens(), max_shard_bytes=5000
    )
    assert len([*(tmp_path / "other").glob("*.safetensors")]) > 3
    assert one.delta == other.delta and one.parents[0]["sha256"] != other.parents[0]["sha256"]
    found, wanted = (checkpoint.load(tmp_path / name).state_dict() for name in ("other", "one"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_gguf_parent_and_its_tokenizer(tmp_path: Path) -> None:
    from moiety.model import gguf

    _, tokenizer = tiny_text(tmp_path / "tokens")
    model = tiny.model("", d_ff=24, vocab_size=tokenizer.vocab_size, tied=True)
    gguf.save_gguf(model, tmp_path / "parent.gguf", kind="f32", tokenizer=tokenizer)
    receipt = upcycle([tmp_path / "parent.gguf"], tmp_path / "child", UpcycleOptions(experts=4))
    assert receipt.promised and (tmp_path / "child" / "tokenizer.json").is_file()
    tokens = torch.randint(tokenizer.vocab_size, (2, 30))
    torch.testing.assert_close(
        logits(tmp_path / "child", tokens), model.eval()(tokens).logits.detach(), rtol=0, atol=1e-4
    )


def test_layers_and_a_dry_run_that_writes_nothing(tmp_path: Path) -> None:
    parent = saved(tmp_path)
    for said, layers in (("every:3", (2,)), ("every:1", (0, 1, 2)), ("2, 0", (0, 2)), ("all", (0, 1, 2))):
        receipt = upcycle([parent], tmp_path / "child", UpcycleOptions(layers=said), dry_run=True)
        assert receipt.layers == layers and receipt.delta == ()
    assert (
        "no public family"
        in upcycle([parent], tmp_path / "child", UpcycleOptions(layers="0"), dry_run=True).written_as
    )
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layers": "every:4"}, "layers is"),
        ({"layers": "3"}, "layers 0 to 2"),
        ({"layers": "1,1"}, "layers is"),
        ({"layers": ""}, "layers is"),
        ({"method": "split", "slices": 5, "experts": 10}, "cannot be cut into 5"),
        ({"slices": 2}, "cuts nothing"),
        ({"method": "split", "slices": 3}, "does not divide"),
        ({"top_k": 9}, "top_k is 9"),
        ({"experts": 1, "top_k": 1}, "at least 2"),
        ({"drop": 0.0}, "drop is"),
        ({"router": "kmeans"}, "kmeans goes by"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    parent = saved(tmp_path)
    with pytest.raises((ConfigError, UsageError), match=said):
        upcycle([parent], tmp_path / "child", UpcycleOptions(**values))
    assert not (tmp_path / "child").exists()


def test_a_model_with_experts_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tiny.model("mixtral"), tmp_path / "moe")
    with pytest.raises(ConfigError, match="has experts already"):
        upcycle([tmp_path / "moe"], tmp_path / "child", UpcycleOptions())


def test_several_parents_give_experts_in_turn_and_the_mean_of_the_rest(tmp_path: Path) -> None:
    parents = [saved(tmp_path, seed=seed) for seed in range(3)]
    receipt = upcycle(parents, tmp_path / "child", UpcycleOptions(experts=6, layers="0,2"))
    assert not receipt.promised and len(receipt.delta) == 3 and min(receipt.delta) > 0.01
    child, *dense = (checkpoint.load(path).state_dict() for path in (tmp_path / "child", *parents))
    for expert in range(6):
        for leaf in ("gate_up", "down"):
            found = child[f"blocks.2.feed_forward.experts.{leaf}"][expert]
            assert torch.equal(found, dense[expert % 3][f"blocks.2.feed_forward.{leaf}"])
    for name in (
        "embed.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.1.feed_forward.down",
        "norm.weight",
    ):
        wanted = torch.stack([one[name] for one in dense]).mean(0)
        torch.testing.assert_close(child[name], wanted, rtol=1e-6, atol=1e-6)


def test_merging_a_model_with_itself_changes_nothing(tmp_path: Path) -> None:
    parent = saved(tmp_path)
    receipt = upcycle([parent] * 3, tmp_path / "child", UpcycleOptions(experts=3))
    assert max(receipt.delta) < 1e-4


def test_parents_of_another_shape_or_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="differ"):
        upcycle([saved(tmp_path), saved(tmp_path, "mistral")], tmp_path / "child", UpcycleOptions())
    _, tokenizer = tiny_text(tmp_path / "tokens")
    torch.manual_seed(0)
    model = tiny.model("", d_ff=24, vocab_size=tokenizer.vocab_size)
    checkpoint.save(model, tmp_path / "with", tokenizer=tokenizer)
    checkpoint.save(model, tmp_path / "without")
    with pytest.raises(UsageError, match="tokenizers"):
        upcycle([tmp_path / "with", tmp_path / "without"], tmp_path / "child", UpcycleOptions())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, calls = saved(tmp_path), []

    def full(*given: Any, **named: Any) -> Tensor:
        calls.append(given)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return expert_tensor(*given, **named)

    monkeypatch.setattr(module, "expert_tensor", full)
    with pytest.raises(StorageError, match="free"):
        upcycle([parent], tmp_path / "child", UpcycleOptions())
    assert [one.name for one in tmp_path.iterdir()] == [parent.name]


KILLED = """
import sys, time
from moiety.train import upcycle as module
from moiety.train.expert_options import UpcycleOptions
real = module.expert_tensor
def slow(*given, **named):
    print("at work", flush=True)
    time.sleep(60 if named["layer"] else 0)
    return real(*given, **named)
module.expert_tensor = slow
module.upcycle([sys.argv[1]], sys.argv[2], UpcycleOptions())
"""


def child_process(code: str, *words: str) -> subprocess.Popen[str]:
    settings = {
        "PYTHONPATH": str(Path(moiety.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # a tensor that goes gives its memory back, so a peak is the program's
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )


def test_a_killed_process_leaves_no_child_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    parent, child = saved(tmp_path), tmp_path / "child"
    with child_process(KILLED, str(parent), str(child)) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not child.exists() and any(one.name.startswith(".child.") for one in tmp_path.iterdir())
    upcycle([parent], child, UpcycleOptions())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["child", parent.name]


PEAK = """
import json, re, sys
from pathlib import Path
from moiety.train import upcycle as module
from moiety.train.expert_options import UpcycleOptions

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

options = UpcycleOptions(experts=8)
module.upcycle([sys.argv[1]], sys.argv[3] + "0", options)  # a small one: everything is imported and warm
begun = peak_bytes()
proved = module._proved
module._proved = lambda receipt, *rest: written.append(peak_bytes()) or proved(receipt, *rest)
written = []
module.upcycle([sys.argv[2]], sys.argv[3], options)
print(json.dumps([written[0] - begun, peak_bytes() - begun]))
"""


def test_peak_memory_is_a_tensor_when_writing_and_a_block_when_proving(tmp_path: Path) -> None:
    """The child has over 260 MB of weights; the largest tensor read has 6 MB, a block 85 MB in float32."""
    small = saved(tmp_path)
    config = ModelConfig(
        vocab_size=600,
        d_model=768,
        layers=4,
        attention=AttentionConfig(heads=8, kv_heads=2, head_dim=96),
        d_ff=1024,
    )
    checkpoint.save(tiny.model("", **dataclasses_values(config)), tmp_path / "large", max_shard_bytes=1 << 23)
    with child_process(PEAK, str(small), str(tmp_path / "large"), str(tmp_path / "child")) as process:
        assert process.stdout is not None
        written, proved = json.loads(process.stdout.read())
    child = sum(one.stat().st_size for one in (tmp_path / "child").glob("*.safetensors"))
    tensor, block = 2 * 1024 * 768 * 4, (8 * 3 * 1024 + 4 * 768) * 768 * 4
    assert child > 260e6
    assert written < 4 * tensor, written
    assert proved < 4 * block, (
        proved,
        block,
    )  # in float64 a block is two, and the whole child would be eight

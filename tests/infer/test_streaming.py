"""Models larger than their memory: the answers of the whole model, within the budget, or an error that says why not."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moiety
from moiety.backends import cpu, cpu_block
from moiety.config import ModelConfig
from moiety.errors import BudgetError, ConfigError, FormatError, MoietyError, UsageError
from moiety.infer import streaming
from moiety.infer.engine import Engine
from moiety.infer.offload import store_of
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions, StreamOptions
from moiety.model import checkpoint
from moiety.model.expert_file import expert_stacks
from moiety.model.quantized import expert_modules
from moiety.model.tokenizer import train_tokenizer
from moiety.model.transformer import Block, Transformer
from moiety.moe.layer import MoE
from moiety.moe.streamed import FEW_TOKENS, StreamedExperts
from moiety.quant.pretend import packed_model
from moiety.quant.quantize import policy_named, quantize
from moiety.residency import POLICIES
from tests import tiny
from tests.model.test_quantized import uneven

GREEDY = SamplingOptions(temperature=0.0)
PROMPTS = [[1, 2, 3], [7] * 5, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0] * 2, [4], [30, 31, 32], [5, 5, 6]]


def folder_of(name: str, tmp_path: Path, policy: Any = None, **changes: Any) -> Path:
    """A packed tiny model on disk."""
    model = tiny.model(name, **changes).eval()
    quantize(model, policy or policy_named("int4"))
    model.save(tmp_path / "packed")
    return tmp_path / "packed"


def with_slots(folder: Path, slots: int, **options: Any) -> Transformer:
    """A streamed model with so many slots, whatever they take."""
    loaded: Transformer | None = None
    asked = StreamOptions(memory="1TiB", **options)
    original = streaming._budget

    def budget(*arguments: Any) -> streaming.Budget:
        return dataclasses.replace(original(*arguments), slots=slots, process_bytes=2**40)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_budget", budget)
        loaded = streaming.load_streamed(folder, asked)
    store = store_of(loaded)
    assert store is not None and store.residency.slots == slots
    store.kv_bytes = 1 << 20
    return loaded


def answers(model: Transformer, sampling: SamplingOptions = GREEDY, **options: Any) -> list[list[int]]:
    asked = EngineOptions(
        **{"page_tokens": 4, "max_positions": 60, "step_tokens": 16, "max_requests": 4, **options}
    )
    engine = Engine(model, options=asked)
    results = engine.generate(PROMPTS, RequestOptions(max_tokens=12, sampling=sampling))
    assert not any(result.error for result in results), results
    return [result.tokens for result in results]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "all_biases", "shared", "sigmoid", "relu"])
def test_streamed_is_resident(name: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    whole = checkpoint.load(folder)
    wanted, tokens = answers(whole), tiny.tokens(whole, 2, 9)
    assert whole.config.moe is not None
    least = whole.config.moe.experts_per_token
    for slots in (least, least + 1, 2 * least + 3):
        model = with_slots(folder, slots)
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
        assert answers(model) == wanted
        store = store_of(model)
        assert store is not None
        found = store.statistics()
        assert found.misses > 0 and found.read_bytes > 0
        store.residency.check()
        store.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_mixed_formats(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SPARE_SHARE", 4)
    folder = folder_of("qwen3_moe", tmp_path, uneven)
    whole = checkpoint.load(folder)
    wanted = answers(whole, SamplingOptions(temperature=1.5, seed=4))
    for slots, prefetch in ((4, False), (9, True), (13, True)):
        model = with_slots(folder, slots, expert_policy=policy, prefetch=prefetch)
        assert answers(model, SamplingOptions(temperature=1.5, seed=4)) == wanted


def test_bfloat16_and_plain_generation(tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path, dtype=torch.bfloat16)
    whole, model = checkpoint.load(folder), with_slots(folder, 5)
    written = [
        list(moiety.generate(one, [1, 2, 3], max_tokens=12, sampling=GREEDY)) for one in (whole, model)
    ]
    assert written[0] == written[1]


def test_a_prompt_loads_every_expert_once(tmp_path: Path) -> None:
    folder = folder_of("", tmp_path, moe=tiny.experts(experts=24, experts_per_token=2))
    model = with_slots(folder, 10, prefetch=False)
    store = store_of(model)
    assert store is not None
    tokens = tiny.tokens(model, 1, 40)
    routing = model(tokens).routing
    used = sum(int((one.counts_E > 0).sum()) for one in routing.values())
    found = store.statistics()
    assert used > 2 * 24 and found.misses == used
    assert found.read_bytes == used * store.slot_bytes


def test_foresight_is_exact_where_the_residual_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("", layers=2, moe=tiny.experts(experts=16, experts_per_token=2)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward_norm.weight.uniform_(0.5, 2.0)
        model.blocks[1].attention.out.weight.zero_()
        for block in model.blocks:
            block.feed_forward.experts.down.zero_()
    quantize(model, policy_named("int4"))
    model.save(tmp_path / "model")
    monkeypatch.setattr(streaming, "SPARE_SHARE", 4)
    streamed = with_slots(tmp_path / "model", 8)
    list(moiety.generate(streamed, [1], max_tokens=40, sampling=SamplingOptions(temperature=2.0)))
    store = store_of(streamed)
    assert store is not None
    found = store.statistics()
    assert found.right == found.guesses > 10


def test_experts_on_disk_can_be_made_unpopular_or_left_out(tmp_path: Path) -> None:
    folder = folder_of("", tmp_path, moe=tiny.experts(experts=12, experts_per_token=3))

    def run(**options: Any) -> Any:
        model = with_slots(folder, 16, prefetch=False, **options)
        list(moiety.generate(model, [3, 1], max_tokens=40, sampling=SamplingOptions(temperature=1.0)))
        store = store_of(model)
        assert store is not None
        return store.statistics()

    plain, biased, thin = run(), run(resident_bias=0.3), run(skip_misses_below=0.33)
    assert plain.pairs == plain.changed_pairs == plain.skipped_pairs == 0
    assert biased.changed_pairs > 0 and biased.hit_rate > plain.hit_rate + 0.1
    assert biased.pairs == 41 * 3 * 3 and "% of pairs changed" in biased.words
    assert 0 < thin.skipped_pairs < thin.pairs and thin.misses < plain.misses
    with pytest.raises(ConfigError, match="allowed is 0 to 1"):
        StreamOptions(memory="1GiB", resident_bias=2.0)


def test_a_token_keeps_its_best_expert(tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path)
    model = with_slots(folder, 2, skip_misses_below=1.0, prefetch=False)
    experts = model.blocks[0].feed_forward.experts
    assert isinstance(experts, StreamedExperts)
    x_TD = torch.randn(50, 20)
    routing = model.blocks[0].feed_forward.route(x_TD)
    thinned = experts._thinned(routing)
    seen = torch.bincount(thinned.token_N, minlength=50)
    assert seen.min() == seen.max() == 1
    assert experts.source.skipped_pairs == 50
    for token in range(50):
        assert thinned.weight_N[thinned.token_N == token] == routing.weight_N[routing.token_N == token].max()


def test_a_failing_store_ends_the_requests_of_the_step_and_the_engine_lives_on(tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path)
    wanted = answers(checkpoint.load(folder))
    model = with_slots(folder, 2)
    engine = Engine(model, options=EngineOptions(max_positions=60, max_requests=4))
    file = expert_stacks(folder)
    byte = file.stacks[1].offset_of(0) + 99
    damaged = []
    with file.path.open("r+b") as opened:
        for expert in range(file.stacks[1].experts):
            opened.seek(file.stacks[1].offset_of(expert) + 99)
            damaged.append(opened.read(1))
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([damaged[-1][0] ^ 1]))
    results = engine.generate(PROMPTS[:3], RequestOptions(max_tokens=12, sampling=GREEDY))
    assert [result.reason for result in results] == ["error"] * 3
    assert all("of layer 1 is damaged" in result.error and result.tokens == [] for result in results)
    with pytest.raises(MoietyError, match="is damaged"):
        list(engine.stream([1, 2]))
    with file.path.open("r+b") as opened:
        for expert, good in enumerate(damaged):
            opened.seek(byte + expert * file.stacks[1].expert_bytes)
            opened.write(good)
    engine.check()
    results = engine.generate(PROMPTS, RequestOptions(max_tokens=12, sampling=GREEDY))
    assert [result.tokens for result in results] == wanted
    assert engine.statistics().experts is not None


def test_saving_a_streamed_model_is_refused(tmp_path: Path) -> None:
    model = with_slots(folder_of("mixtral", tmp_path), 4)
    with pytest.raises(UsageError, match="experts of this model are on disk"):
        model.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


# Budgets

MIDDLE = ModelConfig(
    vocab_size=500,
    d_model=512,
    layers=6,
    d_ff=512,
    max_positions=4096,
    attention=tiny.attention(heads=8, kv_heads=4, head_dim=64),
    moe=tiny.experts(experts=32, experts_per_token=2, d_ff=1024),
)


def write_middle(folder: Path) -> Path:
    """A packed model with 170 MB of experts and a tokenizer."""
    model = packed_model(MIDDLE, "int4-g32")
    for layer, module in enumerate(expert_modules(model).values()):
        for part in module.pair:  # its experts are all the same: make them differ
            for expert, tiles in enumerate(part.tiles):
                tiles.copy_(tiles.roll((expert // 16 + layer, expert), dims=(0, 1)))
    checkpoint.save(model, folder, tokenizer=train_tokenizer(["one two three two one"], 300))
    return folder


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_middle(tmp_path_factory.mktemp("middle") / "model")


RUN = """
import json, sys
import moiety
from moiety.errors import BudgetError
from moiety.infer.engine import Engine
from moiety.infer.open import open_model
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions, StreamOptions
folder, memory = sys.argv[1:]
options, said = EngineOptions(step_tokens=256, max_requests=8), []
try:
    opened = open_model(folder, stream=StreamOptions(memory=memory), engine=options, say=said.append)
except BudgetError as error:
    print(json.dumps({"error": str(error)}))
    raise SystemExit
engine = Engine(opened.model, options=options)
asked = RequestOptions(max_tokens=40, ignore_end=True, sampling=SamplingOptions(temperature=1.0, seed=1))
prompts = [[(7 * one + place) % 500 for place in range(60 * one)] for one in range(1, 9)]
results = engine.generate(prompts, asked)
assert not any(result.error for result in results)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
experts = engine.statistics().experts
print(json.dumps({
    "said": said, "tokens": [result.tokens for result in results], "peak": 1024 * int(peak.split()[1]),
    "slots": experts and experts.slots, "misses": experts and experts.misses,
}))
"""


def run(folder: Path, memory: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), memory],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_budget_holds_and_answers_are_the_same(middle: Path) -> None:
    refused = run(middle, "300MiB")["error"]
    assert "300 MiB is too small for this model; the smallest is" in refused and "kv_bytes" in refused
    smallest = int(refused.split("the smallest is ")[1].split()[0])
    whole = run(middle, "8GiB")
    assert whole["said"] == ["all 192 experts fit into 8GiB: nothing is streamed"] and whole["slots"] is None
    for memory in (smallest, smallest + 70):
        found = run(middle, f"{memory}MiB")
        assert found["tokens"] == whole["tokens"]
        assert found["misses"] > 0 and 2 <= found["slots"] < 192
        assert found["peak"] <= 1.03 * memory * 2**20, (found["peak"] / 2**20, memory, found["said"])
        assert f"memory: {memory:,} MiB = " in found["said"][0] and "of 192 experts" in found["said"][0]


def test_loading_with_memory(middle: Path) -> None:
    with pytest.raises(BudgetError, match="too small"):
        moiety.load(middle, memory="10MiB")
    model = moiety.load(middle, memory="64GiB")
    assert isinstance(model, Transformer) and store_of(model) is None
    assert isinstance(moiety.load(middle), Transformer)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path, middle: Path) -> None:
    tiny.model("mixtral").save(tmp_path / "plain")
    with pytest.raises(UsageError, match=r"is not packed[\s\S]*moiety quantize"):
        moiety.load(tmp_path / "plain", memory="1GiB")
    dense = tiny.model("llama").eval()
    quantize(dense, policy_named("int4"))
    dense.save(tmp_path / "dense")
    with pytest.raises(UsageError, match="has no experts"):
        moiety.load(tmp_path / "dense", memory="1GiB")
    with pytest.raises(ConfigError, match="memory is '12 bananas'"):
        moiety.load(middle, memory="12 bananas")
    with pytest.raises(ConfigError, match="memory is not"):
        StreamOptions(prefetch=False)
    with pytest.raises(ConfigError, match="allowed are auto, lru"):
        StreamOptions(memory="1GiB", expert_policy="mru")
    file = expert_stacks(middle).path
    with file.open("r+b") as opened:
        size = file.stat().st_size
        opened.truncate(size - 5000)
    with pytest.raises(FormatError):
        moiety.load(middle, memory="1GiB")


@pytest.mark.skipif(not cpu.level(), reason="the kernels are not compiled here")
def test_one_call_decides_and_foresees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The front of a streamed block has the bits of the long way, and what it foresees is the next router's word."""
    monkeypatch.setattr(streaming, "SPARE_SHARE", 4)
    folder, kernel, seen = folder_of("qwen3_moe", tmp_path), cpu_block.front, list[bool]()
    wanted = answers(checkpoint.load(folder), page_tokens=16)
    model = with_slots(folder, 13)
    layers = {}
    for moe in model.modules():
        if isinstance(moe, MoE):
            assert isinstance(moe.experts, StreamedExperts) and moe.gate is not None
            layers[moe.gate.weight.data_ptr()] = moe.experts

    def compared(packed: Any, step: Any, x: torch.Tensor, *following: Any) -> Any:
        found = kernel(packed, step, x, *following)
        foresight = layers[packed.router.made_from[1]].foresight
        assert (found.foreseen is None) == (step.tokens > FEW_TOKENS or foresight is None)
        if found.foreseen is not None:
            ratio_D = torch.ones(()) if foresight.ratio_D is None else foresight.ratio_D
            said = foresight.moe.route(found.normed_TD * ratio_D)
            assert torch.equal(said.counts_E, found.foreseen.counts_E)
            assert torch.equal(said.weight_N, found.foreseen.weight_N)
        seen.append(found.foreseen is not None)
        return found

    monkeypatch.setattr(cpu_block, "front", compared)
    assert answers(model, page_tokens=16) == wanted
    assert sum(seen) > 10 and not all(seen)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.register_forward_hook(lambda *_: None)
    before = len(seen)
    assert answers(model, page_tokens=16) == wanted and len(seen) == before

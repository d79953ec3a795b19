"""Measuring: what a figure means, against plain Python; how large it is depends on the machine and is not asked."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from moiety import registry
from moiety.backends.cpu_limits import multiply_rate
from moiety.config import ModelConfig
from moiety.errors import ConfigError, UsageError
from moiety.infer.engine import Engine
from moiety.infer.measure import (
    Decoding,
    Prefill,
    decoding,
    knee,
    multiplies_integers,
    percentile,
    prefill,
    prefill_operations,
    weights_of,
)
from moiety.infer.options import BenchOptions, EngineOptions, RequestOptions
from moiety.infer.runner import imbalance
from moiety.quant.pretend import packed_model, shape_named
from moiety.quant.quantize import policy_named, quantize
from tests import tiny

MEMORY = torch.ones(1 << 20, dtype=torch.uint8)


def test_percentiles_are_values_that_so_many_do_not_pass() -> None:
    draw = random.Random(3)
    for count in (1, 2, 3, 10, 99, 100, 101):
        values = [draw.random() for _ in range(count)]
        for share in (0.01, 0.5, 0.99, 1.0):
            found = percentile(values, share)
            assert sum(one <= found for one in values) >= share * count - 1e-9
            assert found in values and sum(one < found for one in values) < share * count


def test_bytes_of_a_step_are_those_of_the_experts_it_chose() -> None:
    model = tiny.model("", moe=tiny.experts(per_layer=((2, 3, 1),), shared_d_ff=18), dense_layers=(1,)).eval()
    weights = weights_of(model)
    one = 3 * 14 * 20 * 4  # gate, up and down in float32
    assert weights.experts == {0: (one,) * 5, 2: (one,) * 3}
    everything = sum(part.nbytes for part in model.state_dict().values())
    assert weights.dense == everything - 8 * one - 61 * 20 * 4, "the embedding is looked up"
    counts = {0: torch.tensor([4, 0, 1, 0, 0]), 2: torch.tensor([0, 0, 9])}
    assert weights.read(counts) == weights.dense + 3 * one
    tied = tiny.model("", tied=True, head_bias=True)
    assert weights_of(tied).dense == sum(part.nbytes for part in tied.state_dict().values())


def test_experts_in_several_formats_have_bytes_of_their_own() -> None:
    model = tiny.model("", moe=tiny.experts(), d_model=64, dense_layers=(0, 2)).eval()
    forms = ("int8-g32", "int4-g32", "int4-g32", "int8-g32", "int4-g32")
    quantize(model, lambda name, shape: forms if ".experts." in name else None)
    sizes = weights_of(model).experts[1]
    large, small = (
        {size for size, form in zip(sizes, forms, strict=True) if form == "int8-g32"},
        set(sizes[1:3]),
    )
    assert len(large) == len(small) == 1 and max(large) > max(small) == sizes[4]
    parts = sum(part.nbytes for name, part in model.state_dict().items() if ".experts." in name)
    assert math.isclose(sum(sizes), parts)


def test_operations_of_a_prompt() -> None:
    config = tiny.config(tied=True)
    matrices = 3 * (20 * 6 * 4 * 2 + 20 * 6 * 2 * 2 + 3 * 20 * 26)
    scores = 3 * 4 * 4 * 6 * ((9 + 1) // 2)
    assert prefill_operations(tiny.model("", tied=True), 9) == 9 * (2 * matrices + scores) + 2 * 61 * 20
    assert config.layers == 3


def row(sequences: int, tokens_per_s: float) -> Decoding:
    values: dict[str, Any] = dict.fromkeys(Decoding.__dataclass_fields__, 0.0)
    seconds = sequences / tokens_per_s
    return Decoding(
        **{
            **values,
            "sequences": sequences,
            "tokens_per_s": tokens_per_s,
            "latency_p50_s": seconds,
        }
    )


def test_the_knee_is_named_by_its_rule() -> None:
    found = knee([row(64, 104.0), row(1, 10.0), row(32, 100.0), row(8, 50.0)])
    assert found is not None and found.sequences == 32
    assert found.words == (
        "from 32 to 64 sequences tokens/s grows by 4 %, latency grows by 92 %: 32 is enough"
    )
    found = knee([row(1, 10.0), row(2, 11.0), row(4, 19.0)])  # slow at first, as experts are
    assert found is not None and found.sequences == 4
    assert found.words.startswith("from 2 to 4 sequences tokens/s grows by 73 %")
    assert found.words.endswith("4 is still worth it, and more may be")
    found = knee([row(1, 10.0), row(2, 9.5)])
    assert found is not None and found.words.startswith("from 1 to 2 sequences tokens/s falls by 5 %")
    assert knee([row(1, 10.0)]) is None and knee([]) is None


def check(one: Decoding, sequences: int) -> None:
    assert one.sequences == sequences and one.tokens_per_s > 0 and one.first_token_s > 0
    assert 0 < one.latency_p50_s <= one.latency_p99_s
    assert one.read_rate is not None and one.read_share is not None and one.read_share > 0
    assert math.isclose(one.read_share * one.read_rate * sequences, one.step_bytes * one.tokens_per_s)


@pytest.mark.parametrize("sequences", [1, 5])
@pytest.mark.parametrize("name", ["mixtral", "llama", "qwen3_moe"])
def test_decoding_reads_what_its_steps_chose(name: str, sequences: int) -> None:
    model = tiny.model(name).eval()
    one = decoding(model, sequences, prompt=5, tokens=6, memory=MEMORY)
    check(one, sequences)
    weights = weights_of(model)
    if not weights.experts:
        assert one.step_bytes == weights.dense and one.imbalance == one.distinct_experts == 0
        return
    moe = model.config.moe
    assert moe is not None
    assert moe.experts_per_token <= one.distinct_experts <= moe.experts
    each = weights.experts[0][0]
    assert math.isclose(one.step_bytes, weights.dense + len(weights.experts) * each * one.distinct_experts)
    if sequences == 1:
        assert one.distinct_experts == moe.experts_per_token
        assert math.isclose(one.imbalance, moe.experts / moe.experts_per_token, rel_tol=1e-6)


def test_packed_models_and_prompts() -> None:
    model = tiny.model("mixtral").eval()
    assert not multiplies_integers(model)
    quantize(model, policy_named("int8-g32"))
    assert multiplies_integers(model)
    check(decoding(model, 3, prompt=2, tokens=3, kv_dtype="bf16", memory=MEMORY), 3)
    one: Prefill = prefill(model, 40, repeats=1)
    assert one.tokens == 40 and math.isclose(one.tokens_per_s * one.first_token_s, 40)
    assert one.multiply_rate is not None and one.multiply_share is not None
    assert math.isclose(one.operations_per_s, prefill_operations(model, 40) / one.first_token_s)
    assert math.isclose(one.multiply_share * one.multiply_rate, one.operations_per_s)


@pytest.mark.parametrize("integers", [True, False])
def test_a_limit_is_measured_with_the_threads_that_work(integers: bool) -> None:
    assert 1e7 < multiply_rate(integers=integers, seconds=0.01) < 1e17


def test_what_cannot_be_measured_is_said() -> None:
    model = tiny.model("", max_positions=32).eval()
    for sizes in ((1, 20, 20), (2, 20, 4), (0, 1, 2), (1, 0, 2)):
        with pytest.raises(UsageError, match="cannot be measured"):
            decoding(model, sizes[0], prompt=sizes[1], tokens=sizes[2], memory=MEMORY)
    for wrong in ({"tokens": 1}, {"prompt": 0}, {"most": -1}, {"batches": "1;2"}, {"kv_dtype": "fp7"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is "):
            BenchOptions(**wrong)
    asked = BenchOptions(batches=" 8, 1,8", prefill="", most=0)
    assert asked.sizes == (1, 8) and asked.lengths == () and BenchOptions(most=9).sizes == (1, 2, 4, 8)


def test_uneven_layers_and_what_a_step_chose() -> None:
    model = tiny.model("", moe=tiny.experts(per_layer=((2, 3, 1),))).eval()
    engine = Engine(model, options=EngineOptions(max_positions=64))
    assert not engine.expert_counts()
    engine.generate([[1, 2, 3]], RequestOptions(max_tokens=1))
    counts = engine.expert_counts()
    assert [(len(one), int(one.sum())) for one in counts.values()] == [(5, 6), (5, 6), (3, 3)]
    wanted = sum(int(one.max()) * len(one) / int(one.sum()) for one in counts.values()) / 3
    assert math.isclose(engine.statistics().imbalance, wanted, rel_tol=1e-6)
    assert imbalance([torch.zeros(4, dtype=torch.int64)]) == imbalance([]) == 0


DECODERS = [
    name for name in registry.REGISTRY if name.startswith(("gpt-oss-2", "llama-4-s", "deepseek-v3", "olmoe"))
]


@pytest.mark.parametrize("name", DECODERS)
def test_known_shapes_are_cut_to_their_first_layers(name: str) -> None:
    whole = shape_named(name)
    cut = shape_named(name, 5)
    assert cut.layers == 5 and whole == registry.lookup(name)
    assert set(cut.moe_layers) == {layer for layer in whole.moe_layers if layer < 5}
    with pytest.raises(ConfigError, match=f"has {whole.layers}"):
        shape_named(name, whole.layers + 1)


def test_a_random_packed_model_runs() -> None:
    with pytest.raises(ConfigError, match="encoder-decoder"):
        shape_named("switch-base-8")
    config: ModelConfig = tiny.CONFIGS["all_biases"]
    model = packed_model(config, "int4-g32")
    assert not any(part.is_meta for part in model.state_dict().values())
    assert model(torch.arange(9)[None]).logits.isfinite().all()
    check(decoding(model, 2, prompt=3, tokens=3, memory=MEMORY), 2)
    with pytest.raises(UsageError, match=r"needs \d+ GB"):
        packed_model(replace(config, layers=5, d_ff=10**13), "int8")

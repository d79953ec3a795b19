"""Memory, buffers, links, devices, savings: published figures, and definitions written out as loops."""

from __future__ import annotations

import random

import pytest

from moiety import registry
from moiety.config import ModelConfig
from moiety.errors import ConfigError
from moiety.plan.estimate import (
    activations,
    capacity,
    communication,
    dense_equivalents,
    devices_needed,
    kv_bytes,
    memory,
    router_share,
    savings,
    training_memory,
)
from moiety.plan.hardware import DEVICES
from moiety.plan.weights import gigabytes, stored_as
from tests import tiny


def decoder(name: str) -> ModelConfig:
    return registry.lookup_decoder(name)


@pytest.mark.parametrize(
    ("name", "kib"),
    [("deepseek-v3", 68.625), ("mixtral-8x7b", 128), ("qwen3-30b-a3b", 96), ("llama-3-70b", 320)],
)
def test_cache_of_a_token(name: str, kib: float) -> None:
    assert kv_bytes(decoder(name), 1000) == 1000 * kib * 1024
    assert kv_bytes(decoder(name), 1000, "fp32", batch=3) == 6 * kv_bytes(decoder(name), 1000)
    assert kv_bytes(decoder(name), 1000, "fp8") == kv_bytes(decoder(name), 1000) / 2
    assert kv_bytes(decoder(name), 1000, paged=True) == 1008 * kib * 1024, "whole pages of 16"


def test_windows_bound_the_cache_but_not_our_pages() -> None:
    config = decoder("gpt-oss-20b")  # every second layer sees 128 tokens
    assert kv_bytes(config, 131_072) == 48 * 1024 * (131_072 + 128) / 2
    assert kv_bytes(config, 131_072, paged=True) == 48 * 1024 * 131_072
    with pytest.raises(ConfigError, match="kv_dtype is 'int2'"):
        kv_bytes(config, 10, "int2")


@pytest.mark.parametrize(
    ("device", "form", "count"),
    [
        ("mi300x", "4bit", 2),
        ("mi300x", "8bit", 4),
        ("mi300x", "bf16", 7),
        ("l4", "4bit", 14),
        ("h100", "bf16", 17),
    ],
)
def test_devices_for_the_weights_of_deepseek_v3(device: str, form: str, count: int) -> None:
    size = gigabytes(decoder("deepseek-v3"))[form] * 1e9
    assert devices_needed(size, DEVICES[device], usable=False) == count
    assert devices_needed(size, DEVICES[device]) >= count


def test_consumer_hardware_of_32_gb() -> None:
    config, machine = decoder("mixtral-8x7b"), DEVICES["pc-32"]
    four = memory(config, stored_as(config, "int4-g32"), machine, context=4096)
    assert 26e9 < four.weights < four.total < 0.9 * machine.memory_bytes
    assert memory(config, stored_as(config, "int8-g32"), machine, context=4096).total > machine.memory_bytes
    half = memory(config, stored_as(config, "int4-g32"), machine, context=4096, resident=0.5)
    assert four.total - half.total == pytest.approx(
        0.5 * stored_as(config, "int4-g32").expert_bytes, rel=1e-6
    )
    two = memory(config, stored_as(config, "int4-g32"), machine, context=4096, devices=2)
    assert two.runtime == 2 * four.runtime


def test_memory_is_the_sum_of_its_uses() -> None:
    config = decoder("olmoe-1b-7b")
    found = memory(config, stored_as(config, "bf16"), DEVICES["l4"], context=2048, batch=4, kv_dtype="fp8")
    assert found.kv == 4 * 2048 * 64 * 1024 and found.weights == stored_as(config, "bf16").size_bytes
    assert found.activations == sum(activations(config, 512, 4).values())
    assert found.total == found.weights + found.kv + found.activations + found.runtime


def test_our_engine_leaves_the_embedding_on_disk_where_experts_are() -> None:
    def weights(name: str, share: float, *, ours: bool) -> int:
        config = decoder(name)
        stored = stored_as(config, "int4-g32")
        return memory(config, stored, DEVICES["l4"], context=9, resident=share, ours=ours).weights

    olmoe = decoder("olmoe-1b-7b")
    table, experts = 2 * olmoe.vocab_size * olmoe.d_model, stored_as(olmoe, "int4-g32").expert_bytes
    assert weights("olmoe-1b-7b", 1.0, ours=True) == weights("olmoe-1b-7b", 1.0, ours=False)
    assert weights("olmoe-1b-7b", 0.5, ours=False) - weights("olmoe-1b-7b", 0.5, ours=True) == table
    assert (
        weights("olmoe-1b-7b", 1.0, ours=True) - weights("olmoe-1b-7b", 0.5, ours=True)
        == table + experts // 2
    )


def test_dispatch_buffers_grow_with_tokens_and_k() -> None:
    config = decoder("deepseek-v3")
    one, ten = activations(config, 1), activations(config, 10)
    assert one["dispatch"] == 2 * 8 * 7168 * 4 and ten["dispatch"] == 10 * one["dispatch"]
    assert one["hidden"] == 4 * max(8 * 2048 + 2048, 18432) and one["logits"] == 12 * 129_280
    assert activations(config, 1, copies=1)["dispatch"] == one["dispatch"] // 2
    assert activations(decoder("llama-3-70b"), 10)["dispatch"] == 0, "a dense model has none"


def test_capacity_against_counting() -> None:
    config, tokens = tiny.config(moe=tiny.experts(experts=8, experts_per_token=2)), 256
    draw, shares = random.Random(5), []
    for _ in range(400):
        counts = [0] * 8
        for _ in range(tokens):
            for expert in draw.sample(range(8), 2):
                counts[expert] += 1
        shares.append(sum(max(count - 64, 0) for count in counts) / 512)
    found = capacity(config, tokens, 1.0)
    assert found["tokens_per_expert"] == 64 and found["ratio"] == 1.0
    assert found["dropped_share"] == pytest.approx(sum(shares) / len(shares), rel=0.05)
    roomy = capacity(config, tokens, 2.0)
    assert roomy["ratio"] == 2.0 and roomy["dropped_share"] < 1e-6
    assert roomy["buffer_bytes"] == 2 * roomy["dropless_bytes"] == 8 * 128 * (2 * 20 + 2 * 14) * 2
    for bad in (0.0, -1.0):
        with pytest.raises(ConfigError, match="capacity_factor"):
            capacity(config, tokens, bad)
    with pytest.raises(ConfigError, match="dense"):
        capacity(tiny.config(), tokens, 1.0)


def test_bytes_on_links() -> None:
    found = communication(decoder("deepseek-v3"), 4096, 8)
    assert found["layer_bytes"] == 2 * 8 * 4096 * 7168 * 2 * (1 - 1 / 8)
    assert (
        found["bytes"] == pytest.approx(58 * found["layer_bytes"])
        and found["bytes_per_rank"] == found["bytes"] / 8
    )
    assert communication(decoder("deepseek-v3"), 4096, 1)["bytes"] == 0
    with pytest.raises(ConfigError, match="dense"):
        communication(decoder("llama-3-70b"), 1, 2)
    with pytest.raises(ConfigError, match="ranks is 0"):
        communication(decoder("mixtral-8x7b"), 1, 0)


@pytest.mark.parametrize(
    ("name", "percent"), [("deepseek-v3", 0.0159), ("mixtral-8x7b", 0.0022), ("granite-3.0-3b-a800m", 0.0596)]
)
def test_routers_are_small(name: str, percent: float) -> None:
    found = router_share(decoder(name))
    assert round(found["percent_of_total"], 4) == percent
    assert found["percent_of_total"] < found["percent_of_active"] < 1 and 0 < found["percent_of_flops"] < 1


def test_rules_of_thumb_say_so() -> None:
    for name, billions in (("mixtral-8x7b", 24.5), ("deepseek-v3", 158.7), ("qwen3-30b-a3b", 10.1)):
        rule, low, high = dense_equivalents(decoder(name))
        assert round(rule["parameters"] / 1e9, 1) == billions and "rule of thumb" in rule["kind"]
        assert low["parameters"] < rule["parameters"] < high["parameters"]


def test_savings() -> None:
    found = savings(decoder("deepseek-v3"), decoder("llama-3-70b"))
    assert found["flops_percent"] == pytest.approx(100 * (1 - 37.55 / 70.55), abs=0.05)
    assert found["memory_percent"] == pytest.approx(100 * (1 - 671.03 / 70.55), abs=0.1)
    many = savings(decoder("deepseek-v3"), decoder("llama-3-70b"), batch=256)
    assert found["read_percent"] == pytest.approx(47.3, abs=0.2) and many["read_percent"] < -800
    same = savings(decoder("llama-3-70b"), decoder("llama-3-70b"), batch=9)
    assert set(same.values()) == {0.0}


def test_training_memory_counts_sixteen_bytes_a_parameter() -> None:
    config = decoder("olmoe-1b-7b")
    found = training_memory(config, 4096)
    kept = found.pop("activations")
    assert sum(found.values()) == 16 * 6_919_161_856 and 0 < kept < sum(found.values())
    assert training_memory(config, 8192)["activations"] == 2 * kept
    assert sum(training_memory(config, 0, "fp32").values()) == 16 * 6_919_161_856
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        training_memory(config, 1, "int8")

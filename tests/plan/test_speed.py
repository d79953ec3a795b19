"""How fast: published figures where there are some, and the sums written out by hand for a machine of round numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from moiety import cost, registry
from moiety.config import ModelConfig
from moiety.plan.hardware import DEVICES, DISK, KINDS, Band
from moiety.plan.plan import here
from moiety.plan.speed import (
    EXCHANGE,
    MARGIN,
    Machine,
    Setting,
    decode,
    distinct_share,
    prefill,
    read_share_limit,
    roofline,
    training,
)
from moiety.plan.weights import stored_as
from tests.plan.profiles import WEIGHT_S, made


def decoder(name: str) -> ModelConfig:
    return registry.lookup_decoder(name)


def on(name: str, **changes: object) -> Machine:
    return Machine(device=DEVICES[name], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "device", "form", "rate"),
    [
        ("llama-3-70b", "h100", "bf16", 24.1),
        ("gpt-oss-20b", "m2-ultra", "bf16", 110.9),
        ("mixtral-8x7b", "h100", "bf16", 131.4),
    ],
)
def test_rooflines(name: str, device: str, form: str, rate: float) -> None:
    """Active bytes over bandwidth: 70B on an H100 draws no 80 tokens/s, gpt-oss-20b on an M-series 111."""
    config = decoder(name)
    found = roofline(config, stored_as(config, form), on(device), Setting(context=0))
    assert found == pytest.approx(rate, abs=0.15)


def test_distinct_experts() -> None:
    config = decoder("deepseek-v3")
    for batch, experts in ((1, 8), (32, 163.3), (128, 251.6)):
        assert 256 * distinct_share(config, batch) == pytest.approx(experts, abs=0.05)
    assert distinct_share(decoder("llama-3-70b"), 5) == 0
    assert read_share_limit(config) == math.ceil(math.log(0.1) / math.log(1 - 8 / 256))
    assert 256 * distinct_share(config, read_share_limit(config)) >= 230.4


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "llama-3-70b"])
@pytest.mark.parametrize("device", ["h100", "m4-max", "pc-64"])
def test_more_is_never_cheaper(name: str, device: str) -> None:
    config, machine = decoder(name), on(device)
    stored = stored_as(config, "int4-g32")
    steps = [decode(config, stored, machine, Setting(batch=batch)) for batch in (1, 2, 8, 64, 512, 8192)]
    for one, other in pairwise(steps):
        assert one.seconds.low <= other.seconds.low and one.tokens_per_s.low <= other.tokens_per_s.low * (
            1 + 1e-9
        )
        assert one.read_bytes <= other.read_bytes <= stored.size_bytes
    assert all(0 < one.tokens_per_s.low < one.tokens_per_s.high for one in steps)
    assert steps[0].limit == "memory bandwidth" and steps[-1].limit == "arithmetic"
    far = decode(config, stored, machine, Setting(batch=8, context=8192))
    assert far.seconds.low > decode(config, stored, machine, Setting(batch=8, context=512)).seconds.low
    wide = decode(config, stored_as(config, "bf16"), machine, Setting())
    assert wide.seconds.low > 2 * steps[0].seconds.low
    prompts = [prefill(config, stored, machine, Setting(), tokens) for tokens in (1, 100, 512, 513, 4096)]
    assert all(one.seconds.low < other.seconds.low for one, other in pairwise(prompts))


def test_a_published_step_by_hand() -> None:
    config, machine = decoder("mixtral-8x7b"), on("l40s")
    stored = stored_as(config, "bf16")
    found = decode(config, stored, machine, Setting(context=1000))
    read = 2 * (cost.parameters(config).active - 32_000 * 4096 - 266_240) + 1000 * 131_072
    shares = KINDS["gpu"].decode
    assert found.read_bytes + 1000 * 131_072 == pytest.approx(read)
    assert found.seconds.low == pytest.approx(read / 864e9 / shares.high)
    assert found.seconds.high == pytest.approx(read / 864e9 / shares.low)
    two = decode(config, stored, on("l40s", count=2), Setting(context=1000))
    waiting = 64 * (EXCHANGE.low + 4 * 4096 / 32e9)
    assert two.seconds.low == pytest.approx(found.seconds.low / 2 + waiting)


def test_a_measured_step_by_hand() -> None:
    config, profile = decoder("qwen3-30b-a3b"), made()
    machine = Machine(device=here(profile), profile=profile)
    stored = stored_as(config, "int8-g32", kept="fp32")
    found = decode(config, stored, machine, Setting(context=1000, kv_dtype="fp32"))
    experts = 8 * 48 * 3 * 2048 * 768
    rest = cost.parameters(config).components
    packed = experts + rest["attention"] - 48 * 2 * 128 + rest["head"]
    seconds = packed * WEIGHT_S["int8-g32"] + rest["routers"] * WEIGHT_S["fp32"]
    seconds += 1000 * 48 * 2 * 4 * 128 * 4e-10
    seconds += 1e-4 + 48 * 1e-5 + 2e-5 + 151_936 * 1e-10 + 48 * 2048 * 1e-10 + 48 * 3e-7
    assert found.seconds.low == pytest.approx(0.75 * MARGIN.low * seconds)
    assert found.seconds.high == pytest.approx(1.25 * MARGIN.high * seconds)
    assert found.tokens_per_s.low == pytest.approx(1 / found.seconds.high)
    plain = decode(config, stored_as(config, "fp32"), machine, Setting(context=0))
    seconds = (packed + rest["routers"]) * WEIGHT_S["fp32"] + 2 * (
        1e-4 + 48e-5 + 2e-5 + 151_936e-10 + 48 * 2048e-10 + 48 * 3e-7
    )
    assert plain.seconds.low == pytest.approx(0.75 * MARGIN.low * seconds), (
        "plain weights have costs of their own"
    )


def test_a_measured_prompt_by_hand() -> None:
    config, profile = decoder("olmoe-1b-7b"), made()
    machine, stored = (
        Machine(device=here(profile), profile=profile),
        stored_as(config, "int4-g32", kept="fp32"),
    )
    found = prefill(config, stored, machine, Setting(kv_dtype="fp32"), 600)
    counts, seconds = cost.parameters(config).components, 0.0
    for start, tokens in ((0, 512), (512, 88)):
        distinct = 64 * (1 - (1 - 8 / 64) ** tokens)
        rows = 8 * tokens / distinct

        def factor(count: float) -> float:
            return max(count / 8, 1.0)

        seconds += distinct * 16 * 3 * 2048 * 1024 * WEIGHT_S["int4-g32"] * factor(rows)
        seconds += 16 * 4 * 2048 * 2048 * WEIGHT_S["int4-g32"] * factor(tokens)
        seconds += counts["routers"] * WEIGHT_S["fp32"] * factor(tokens)
        seconds += tokens * 4 * 16 * 128 * 16 * (start + (tokens + 1) // 2) * 1e-11
        seconds += 1e-4 + 16e-5 + tokens * 16 * (2048 * 1e-10 + 3e-7)
    seconds += (
        counts["head"] * WEIGHT_S["int8-g32"] + 2e-5 + 50_304 * 1e-10
    )  # the last token alone is drawn after
    assert found.seconds.low == pytest.approx(0.75 * MARGIN.low * seconds, rel=1e-6)


def test_what_limits_a_measured_step() -> None:
    profile, config = made(), decoder("olmoe-1b-7b")
    machine, stored = Machine(device=here(profile), profile=profile), stored_as(config, "int4-g32")
    assert decode(config, stored, machine, Setting()).limit == "memory bandwidth"
    assert prefill(config, stored, machine, Setting(), 512).limit == "arithmetic"
    slow = made(
        overhead={kind: {**costs, "step": (1.0, 1.0, 1.0)} for kind, costs in profile.overhead.items()}
    )
    assert decode(config, stored, Machine(device=here(slow), profile=slow), Setting()).limit == "fixed costs"


def test_formats_that_were_not_measured_are_like_their_nearest() -> None:
    profile, config = made(), decoder("olmoe-1b-7b")
    machine = Machine(device=here(profile), profile=profile)
    near, far = (
        decode(config, stored_as(config, form), machine, Setting()) for form in ("int4-g64", "int4-g32")
    )
    assert near.seconds.low == pytest.approx(far.seconds.low)
    few = made(
        experts={form: table for form, table in profile.experts.items() if form in ("fp32", "int4-g32")}
    )
    slower = decode(config, stored_as(config, "int8-g32"), Machine(device=here(few), profile=few), Setting())
    assert slower.seconds.low > 1.2 * far.seconds.low, "more bits take longer than those of the nearest"
    eight = decode(config, stored_as(config, "int8"), machine, Setting())
    assert eight.seconds.low > 1.5 * far.seconds.low


@pytest.mark.parametrize("batch", [1, 4])
def test_experts_on_disk(batch: int) -> None:
    config, profile = decoder("mixtral-8x7b"), made()
    machine, stored = Machine(device=here(profile), profile=profile), stored_as(config, "int4-g32")
    whole = decode(config, stored, machine, Setting(batch=batch))
    half = decode(config, stored, machine, Setting(batch=batch, resident=0.5))
    missed = 0.5 * distinct_share(config, batch) * stored.expert_bytes
    assert whole.missed_bytes == 0 and half.missed_bytes == pytest.approx(missed) and half.limit == "disk"
    assert half.seconds.low == pytest.approx(max(whole.seconds.low, missed / 2.5e9))
    assert half.seconds.high == pytest.approx(whole.seconds.high + missed / 1.5e9)
    assert half.read_bytes == whole.read_bytes
    lucky = decode(config, stored, machine, Setting(batch=batch, resident=0.5, hit_rate=1.0))
    assert lucky.seconds == whole.seconds and lucky.missed_bytes == 0
    none = decode(config, stored, machine, Setting(batch=batch, resident=0.5, hit_rate=0.0))
    assert none.missed_bytes == pytest.approx(2 * missed)
    known = Machine(device=machine.device, profile=profile, disk=Band(1e12, 1e12))
    assert decode(config, stored, known, Setting(batch=batch, resident=0.5)).limit != "disk"


def test_a_prompt_loads_each_expert_once_for_each_of_its_steps() -> None:
    config, machine = decoder("mixtral-8x7b"), on("laptop-16")
    stored = stored_as(config, "int4-g32")
    one, two = (
        prefill(config, stored, machine, Setting(resident=0.25, hit_rate=0.9), tokens).missed_bytes
        for tokens in (512, 1024)
    )
    assert one == pytest.approx(0.75 * stored.expert_bytes, rel=1e-6) and two == pytest.approx(2 * one)
    assert machine.tier_rate(1e6) == DISK


def test_experts_on_the_host() -> None:
    config = decoder("qwen3-30b-a3b")
    stored = stored_as(config, "int4-g32")
    found = decode(config, stored, on("rtx-4090"), Setting(resident=0.5))
    assert found.limit == "link to the host" and found.seconds.high > found.missed_bytes / 16e9
    assert Machine(device=DEVICES["rtx-4090"], profile=made()).tier_rate(1e6) == Band(16e9, 0.9 * 32e9)


def test_disk_rates_by_the_size_of_a_read() -> None:
    profile = made()
    machine = Machine(device=here(profile), profile=profile)
    assert machine.tier_rate(1e6) == Band(0.75e9, 1.25e9) and machine.tier_rate(20e6) == Band(1.5e9, 2.5e9)
    assert Machine(device=machine.device, profile=made(disk={})).tier_rate(1e6) == DISK


def test_training_of_deepseek_v3() -> None:
    found = training(decoder("deepseek-v3"), on("h800", count=2048), 14.8e12, 4096)
    for published in (2.664e6, 2.788e6):
        assert found["device_hours"].low < published < found["device_hours"].high
    assert found["days"].low < 54 < found["days"].high
    assert found["days"].low == pytest.approx(found["device_hours"].low / 24 / 2048)
    assert pytest.approx(5.576e6) == 2 * 2.788e6
    small = training(decoder("olmoe-1b-7b"), on("h100"), 23_600 * 3600, 4096)
    assert small["device_hours"].low < 1 < small["device_hours"].high, "OLMoE: 23,600 tokens/s on one H100"

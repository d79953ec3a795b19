"""Layouts: what fits, with how many experts, and the advice in words."""

from __future__ import annotations

import dataclasses

import pytest

from moiety import registry
from moiety.plan.estimate import memory
from moiety.plan.hardware import DEVICES
from moiety.plan.plan import here
from moiety.plan.search import Layout, advice, best, cycle_share, flags, layouts, least_share, short_bytes
from moiety.plan.speed import Machine, Setting
from moiety.plan.weights import stored_as
from tests import tiny
from tests.plan.profiles import made

GIB = 2**30
MIXTRAL = registry.lookup_decoder("mixtral-8x7b")
FORMS = tuple(stored_as(MIXTRAL, form) for form in ("bf16", "int8-g32", "int4-g32"))


def found(memory_bytes: float, *, device: str = "pc-64", **changes: object) -> list[Layout]:
    machine = Machine(device=DEVICES[device])
    return layouts(MIXTRAL, FORMS, machine, Setting(**changes), memory_bytes, context=4096)  # type: ignore[arg-type]


@pytest.mark.parametrize("gib", [4, 8, 12, 24, 48, 96, 200])
def test_as_many_experts_as_fit(gib: int) -> None:
    for one in found(gib * GIB):
        slots = one.setting.resident * 256
        assert slots == pytest.approx(round(slots)) and 2 <= round(slots) <= 256
        assert (one.memory.total <= gib * GIB) == one.fits == (one.decode is not None)
        if one.fits and one.setting.resident < 1:
            more = memory(
                MIXTRAL, one.stored, DEVICES["pc-64"], context=4096, resident=(round(slots) + 1) / 256
            )
            assert more.total > gib * GIB, "one more expert would have fitted"
        assert one.below_cycle == (one.fits and slots < 63.5)


def test_the_cycle_of_a_token() -> None:
    assert cycle_share(MIXTRAL) == 64 / 256 and least_share(MIXTRAL) == 2 / 256
    assert cycle_share(MIXTRAL, 8) == 1.0 and least_share(MIXTRAL, 3) == 6 / 256
    uneven = tiny.config(layers=3, moe=tiny.experts(per_layer=((0, 3, 1), (2, 7, 4))))
    assert cycle_share(uneven) == 7 / 15 and least_share(uneven) == 4 / 15


def test_advice_in_one_sentence() -> None:
    said = advice(found(16 * GIB), 16 * GIB)
    assert said.startswith("fits in 16.0 GiB at int4-g32 with ") and "% of experts resident: expect " in said
    assert said.endswith("limited by disk") and " to " in said and "LRU" not in said
    assert "LRU would never hit" in advice(found(6 * GIB), 6 * GIB)
    assert "at int4-g32 wholly in memory" in advice(found(40 * GIB), 40 * GIB)
    little = advice(found(1 * GIB), 1 * GIB)
    assert (
        little.startswith("does not fit in 1.0 GiB: the smallest that works is int4-g32") and "GiB" in little
    )
    assert best(found(1 * GIB)) is None


def test_more_bits_where_they_cost_little() -> None:
    many = found(10**12)
    (four,) = (one for one in many if one.stored.form == "int4-g32")
    assert best(many) is four
    assert four.decode is not None
    slower = dataclasses.replace(many[0], decode=dataclasses.replace(four.decode))
    assert best([slower, four]) is slower, "as fast, with more bits"


def test_a_dense_model_fits_or_does_not() -> None:
    config = registry.lookup_decoder("mistral-7b")
    machine, stored = Machine(device=DEVICES["laptop-16"]), stored_as(config, "bf16")
    for gib, fits in ((8, False), (20, True)):
        (one,) = layouts(config, [stored], machine, Setting(), gib * GIB, context=1024)
        assert one.fits is fits and one.setting.resident == 1.0 and not one.below_cycle
    assert "with one layer's" not in advice(
        layouts(config, [stored], machine, Setting(), GIB, context=1024), GIB
    )


def test_our_engine_counts_whole_pages_and_its_own_process() -> None:
    profile = made()
    machine = Machine(device=here(profile), profile=profile)
    (one,) = layouts(MIXTRAL, FORMS[2:], machine, Setting(), 31e9, context=4090, ours=True)
    assert one.memory.runtime == 250 * 10**6 and one.memory.kv == 4096 * 131_072


def test_without_the_embedding_nearly_all_may_fit() -> None:
    machine, stored = Machine(device=DEVICES["l4"]), FORMS[2]

    def one(size_bytes: float) -> Layout:
        return layouts(MIXTRAL, [stored], machine, Setting(), size_bytes, context=100, ours=True)[0]

    whole = one(1e12).memory.total
    assert one(whole).setting.resident == 1.0 and one(whole).fits
    nearly = one(whole - stored.looked_up_bytes / 2)
    assert nearly.fits and nearly.setting.resident == 1 - 1 / 256
    assert nearly.memory.weights < one(whole).memory.weights - stored.looked_up_bytes


def test_flags_of_other_programs() -> None:
    def said(device: str, share: float, devices: int = 1, **changes: object) -> dict[str, str]:
        setting = Setting(resident=share, **changes)  # type: ignore[arg-type]
        one = dataclasses.replace(found(10**12)[2], setting=setting)
        machine = Machine(device=DEVICES[device], count=devices)
        return flags(MIXTRAL, one, machine, name="mixtral-8x7b", context=4096, devices=devices)

    whole = said("h100", 1.0)
    assert "-ngl 99 -c 4096" in whole["llama.cpp"] and "cpu-moe" not in whole["llama.cpp"]
    assert "--max-model-len 4096 --max-num-seqs 1" in whole["vllm"] and "offload" not in whole["vllm"]
    part = said("rtx-4090", 0.75)
    assert (
        "--n-cpu-moe 8" in part["llama.cpp"]
        and r"blk\.(0|1|2|3|4|5|6|7)\.ffn_.*_exps" in part["llama.cpp by name"]
    )
    assert f"--cpu-offload-gb {0.25 * FORMS[2].expert_bytes / GIB:.1f}" in part["vllm"]
    many = said("l4", 1.0, devices=4, kv_dtype="fp8", batch=3)
    assert "--tensor-parallel-size 4 --enable-expert-parallel --kv-cache-dtype fp8" in many["vllm"]
    assert "-c 12288 --cache-type-k q8_0" in many["llama.cpp"]
    here_ = said("pc-32", 0.5)
    assert (
        "-ngl 0" in here_["llama.cpp"]
        and "not possible" in here_["vllm"]
        and "mmap" in here_["llama.cpp note"]
    )


@pytest.mark.parametrize(
    ("size", "words"), [(512, "0 KiB"), (1 << 20, "1.0 MiB"), (1.5 * GIB, "1.5 GiB"), (2048 * GIB, "2.0 TiB")]
)
def test_sizes_for_people(size: float, words: str) -> None:
    assert short_bytes(size) == words.replace("0 KiB", "0 KiB")

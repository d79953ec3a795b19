"""Verdicts: what is expected of a run, and how it compares."""

from __future__ import annotations

import json

import pytest

from moiety import registry
from moiety.plan.hardware import Band
from moiety.plan.plan import here
from moiety.plan.speed import Machine
from moiety.plan.verdict import MEMORY_BAND, entry, expected, judge, promise, sentence, share_inside
from moiety.plan.weights import stored_as
from tests.plan.profiles import made

PLANNED = {"decode, batch 1": (Band(30, 40), "tokens/s"), "memory": (Band(0.95e9, 1.05e9), "bytes")}


def test_inside_is_between_both_ends() -> None:
    for rate, inside in ((30.0, True), (40.0, True), (29.9, False), (40.1, False)):
        (one,) = judge(PLANNED, {"decode, batch 1": rate})
        assert one.inside is inside and one.unit == "tokens/s" and one.planned == Band(30, 40)
    with pytest.raises(AssertionError, match="prefill"):
        judge(PLANNED, {"prefill 3": 1.0})


def test_words_and_history() -> None:
    verdicts = judge(PLANNED, {"decode, batch 1": 50.0, "memory": 1e9})
    said = sentence(verdicts)
    assert "decode, batch 1 50 tokens/s (OUTSIDE 30 to 40)" in said and "(inside 950,000,000 to" in said
    assert sentence([]) == "nothing was measured"
    line = json.loads(json.dumps(entry({"model": "m"}, verdicts, "2026-01-01 00:00")))
    assert line["case"] == {"model": "m"} and line["verdicts"][0]["measured"] == 50.0
    assert share_inside([line, line]) == (2, 4) and share_inside([]) == (0, 0)


def test_what_is_expected_of_a_run() -> None:
    config, profile = registry.lookup_decoder("olmoe-1b-7b"), made()
    machine, stored = Machine(device=here(profile), profile=profile), stored_as(config, "int4-g32")
    how = {"batches": {1: 100, 8: 50}, "prompts": [512], "kv_dtype": "bf16"}
    found = expected(config, stored, machine, **how)  # type: ignore[arg-type]
    assert set(found) == {"decode, batch 1", "decode, batch 8", "prefill 512", "memory"}
    assert found["decode, batch 1"][0].low < found["decode, batch 8"][0].low
    memory = found["memory"][0]
    assert memory.low / memory.high == pytest.approx((1 - MEMORY_BAND) / (1 + MEMORY_BAND))
    mapped = expected(config, stored, machine, mapped=True, **how)["memory"][0]  # type: ignore[arg-type]
    assert mapped.high == memory.high
    assert memory.low - mapped.low == pytest.approx((1 - MEMORY_BAND) * 0.875 * stored.expert_bytes)
    served = expected(config, stored, machine, room=(100, 1), beside_bytes=10**7, **how)["memory"][0]  # type: ignore[arg-type]
    alone = expected(config, stored, machine, batches={1: 100}, prompts=[], kv_dtype="bf16")["memory"][0]
    assert served.middle - alone.middle == pytest.approx(10**7)
    assert promise({"decode": (Band(2, 30.5), "tokens/s"), "hit rate": (Band(0.5, 1), "")}) == (
        "the plan: decode 2 to 30.5 tokens/s, hit rate 0.5 to 1"
    )
    half = expected(config, stored, machine, resident=0.5, **how)  # type: ignore[arg-type]
    assert half["hit rate"][0] == Band(0.475, 1.0) and half["disk"][0].low == 0
    assert memory.high - half["memory"][0].high == pytest.approx(
        1.05 * (0.5 * stored.expert_bytes + stored.looked_up_bytes)
    )

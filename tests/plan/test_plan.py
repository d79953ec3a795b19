"""The whole plan: every known model on some devices, fields that scripts rely on, and refusals."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from moiety import registry
from moiety.errors import ConfigError, MoietyError
from moiety.plan.hardware import DEVICES
from moiety.plan.options import PlanOptions, count_named
from moiety.plan.plan import UNMEASURED, here, make_plan
from moiety.plan.weights import stored_as
from tests.plan.profiles import made


def planned(name: str, **options: Any) -> dict[str, Any]:
    found = make_plan(name, registry.lookup(name), PlanOptions(**options))
    json.dumps(found, allow_nan=False)
    return found


@pytest.mark.parametrize("name", registry.REGISTRY)
def test_every_known_model_can_be_planned(name: str) -> None:
    found = planned(name, device="h100", devices=8, context=2048)
    assert found["parameters"]["total"] > 0 and found["advice"] and found["weight_gigabytes"]["bf16"] > 0
    if "layouts" in found:
        assert [one["format"] for one in found["layouts"]] == ["bf16", "int8-g32", "int4-g32"]
        assert all(one["fits"] == (one["decode"] is not None) for one in found["layouts"])
        assert found["batches"][0]["batch"] == 1 and found["flags"]["llama.cpp"].startswith("llama-server")
    else:
        assert "encoder-decoder" in found["advice"]


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_can_be_planned_for(device: str) -> None:
    found = planned("olmoe-1b-7b", device=device)
    assert found["device"]["name"] == device and found["device"]["source"] and found["device"]["date"]
    assert found["chosen"] is not None and found["layouts"][found["chosen"]]["fits"]
    assert (found["cost"] is None) == (DEVICES[device].price is None)


def test_fields_that_scripts_rely_on() -> None:
    found = planned("deepseek-v3", device="mi300x")
    assert found["weight_gigabytes"]["bf16"] == pytest.approx(1342.05, abs=0.01)
    assert found["weight_gigabytes"]["8bit"] == pytest.approx(671.03, abs=0.01)
    assert found["weight_gibibytes"]["4bit"] == pytest.approx(312.47, abs=0.01)
    assert [found["devices_for_weights"][form] for form in ("4bit", "8bit", "bf16")] == [2, 4, 7]
    assert found["devices_needed"]["bf16"] >= 8 and found["router"]["percent_of_total"] == pytest.approx(
        0.0159, abs=5e-5
    )
    counts = found["parameters"]
    assert counts["total"] == 671_026_419_200 and counts["active_percent"] == pytest.approx(5.596, abs=1e-3)
    assert counts["active_percent_of_experts"] == 3.125 and found["kv_bytes_per_token"] == 70_272
    assert found["flops"]["multiplications_of_prompt_by_active"] == 512 * counts["active"]
    assert sum(found["flops"]["components"].values()) == found["flops"]["per_token"]


def test_a_claim_that_cannot_be() -> None:
    found = planned("llama-3-70b", device="h100", format="bf16", tokens_per_s=80.0, price=2.0)
    assert found["cost"]["claimed_dollars_per_token"] == pytest.approx(6.94e-6, rel=1e-3)
    assert (
        len(found["warnings"]) == 2
        and "does not fit" in found["warnings"][0]
        and "2 hold it" not in found["advice"]
    )
    assert "above the roofline, 24.1 tokens/s" in found["warnings"][1]
    found = planned("llama-3-70b", device="h100", format="bf16", tokens_per_s=140.0, price=2.0)
    assert found["cost"]["claimed_dollars_per_token"] == pytest.approx(3.97e-6, rel=1e-3)
    honest = planned("olmoe-1b-7b", device="h100", tokens_per_s=100.0, price=2.0)
    assert honest["warnings"] == []
    both = honest["cost"]["dollars_per_million_tokens"]
    speeds = honest["layouts"][honest["chosen"]]["decode"]["tokens_per_s"]
    assert both["low"] == pytest.approx(2 / 3600 / speeds["high"] * 1e6) and both["low"] < both["high"]


def test_what_has_an_option_of_its_own() -> None:
    bare = planned("mixtral-8x7b", device="h100")
    assert not {"training", "capacity", "communication", "against"} & bare.keys()
    config = registry.lookup("deepseek-v3")
    options = PlanOptions(
        device="h800",
        devices=2048,
        train_tokens="14.8T",
        capacity_factor=1.25,
        ranks=8,
        against="llama-3-70b",
    )
    found = make_plan("deepseek-v3", config, options, other=registry.lookup("llama-3-70b"))
    assert found["training"]["device_hours"]["low"] < 2.788e6 < found["training"]["device_hours"]["high"]
    assert found["training"]["dollars"]["low"] == pytest.approx(2 * found["training"]["device_hours"]["low"])
    assert found["training"]["memory"]["moments"] == 8 * 671_026_419_200
    assert found["training"]["devices_for_memory"] > 100
    assert (
        found["capacity"]["ratio"] == pytest.approx(1.25, abs=0.01)
        and 0 < found["capacity"]["dropped_share"] < 0.1
    )
    links, between = found["communication"], found["communication"]["links"]
    assert sum(between["pair"].values()) == pytest.approx(links["bytes"]) and between["pair"]["between"] == 0
    assert between["node"]["inside"] < between["pair"]["inside"]
    moving = between["node"]["inside"] / 8 / 200e9
    assert moving / 0.79 < links["seconds"]["low"] < links["seconds"]["high"] < moving / 0.5 + 116 * 31e-6
    assert found["against"]["flops_percent"] == pytest.approx(46.8, abs=0.05)
    assert planned("olmoe-1b-7b", device="a100-40", train_tokens="5.1T")["training"]["dollars"] is None


def test_this_machine() -> None:
    assumed = planned("olmoe-1b-7b")
    assert assumed["device"]["source"] == UNMEASURED and not assumed["device"]["measured"]
    profile = made()
    found = make_plan("olmoe-1b-7b", registry.lookup("olmoe-1b-7b"), PlanOptions(), profile=profile)
    assert found["device"]["measured"] and found["device"]["memory_bytes"] == 32e9
    assert found["device"]["bandwidth"] == here(profile).bandwidth == 37.5e9
    assert here(None).memory_bytes > 1e8 and here(None).name == "cpu"
    stored = stored_as(registry.lookup_decoder("olmoe-1b-7b"), "int8-g32")
    one = make_plan("m", registry.lookup("olmoe-1b-7b"), PlanOptions(), profile=profile, stored=stored)
    assert [layout["format"] for layout in one["layouts"]] == ["int8-g32"]
    asked = make_plan(
        "m", registry.lookup("olmoe-1b-7b"), PlanOptions(kv_dtype="fp32", disk_rate="1GB"), profile=profile
    )
    assert asked["layouts"][0]["kv_dtype"] == "fp32"


def test_a_memory_budget() -> None:
    found = planned("mixtral-8x7b", device="pc-64", memory="12GiB")
    assert found["memory_budget_bytes"] == 12 * 2**30 and "fits in 12.0 GiB" in found["advice"]
    (four,) = (one for one in found["layouts"] if one["format"] == "int4-g32")
    assert (
        0.3 < four["resident"] < 0.5
        and four["decode"]["missed_bytes"] > 0
        and four["hit_rate"] == four["resident"]
    )
    better = planned("mixtral-8x7b", device="pc-64", memory="12GiB", hit_rate=0.9)["layouts"][2]
    assert (
        better["hit_rate"] == 0.9
        and better["decode"]["tokens_per_s"]["low"] > four["decode"]["tokens_per_s"]["low"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "h1000"}, "no device 'h1000'"),
        ({"devices": 2}, "devices is 2"),
        ({"devices": 0}, "devices is 0"),
        ({"memory": "12 apples"}, "memory is '12 apples'"),
        ({"memory": "12"}, "does not fit|smallest"),
        ({"device": "l4", "memory": "200GB"}, "memory is 186"),
        ({"memory": "-1GB"}, "memory is '-1GB'"),
        ({"memory": "0GiB"}, "memory is '0GiB'"),
        ({"memory": "12Q"}, "memory is '12Q'"),
        ({"context": 10**6}, "context is 1000000; the model has"),
        ({"prompt": 5000}, "prompt is 5000, context is 4096"),
        ({"batch": 0}, "batch is 0"),
        ({"format": "int5"}, "no weight format 'int5'"),
        ({"kv_dtype": "int4"}, "kv_dtype is 'int4'"),
        ({"hit_rate": 1.5}, "hit_rate is 1.5"),
        ({"disk_rate": "fast"}, "disk_rate is 'fast'"),
        ({"train_tokens": "many"}, "train_tokens is 'many'"),
        ({"price": -1.0}, "price is -1.0"),
        ({"capacity_factor": -0.5}, "capacity_factor"),
    ],
)
def test_refusals_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    if options.get("memory") == "12":  # twelve bytes are a size, in which nothing fits
        assert "does not fit" in planned("olmoe-1b-7b", **options)["advice"]
        return
    with pytest.raises(MoietyError, match=message):
        planned("olmoe-1b-7b", **options)


def test_counts() -> None:
    assert count_named("14.8T", "tokens") == 14.8e12 and count_named("300b", "tokens") == 3e11
    for text in ("", "T", "14.8TB", "1e12", "-3T", "0"):
        with pytest.raises(ConfigError, match="tokens is"):
            count_named(text, "tokens")


def test_more_memory_than_this_machine_has_is_planned_and_said() -> None:
    here_bytes = here(None).memory_bytes
    found = planned("mixtral-8x7b", device="cpu", memory=f"{2 * here_bytes:.0f}B")
    assert found["memory_budget_bytes"] == round(2 * here_bytes)
    assert any("this machine has" in line for line in found["warnings"])
    assert not any("this machine has" in line for line in planned("mixtral-8x7b", device="cpu")["warnings"])
    with pytest.raises(ConfigError, match="1 x l4 has"):
        planned("mixtral-8x7b", device="l4", memory="200GiB")


def test_training_across_nodes_is_one_model() -> None:
    """Steps, days and hours say the same; all experts in every node trade all-to-alls for gradients."""
    found = planned(
        "deepseek-v3", device="h800", devices=2048, ranks=64, nodes=8, train_tokens="14.8T", train_step="60M"
    )["training"]
    assert found["steps"] == pytest.approx(14.8e12 / 60e6) and found["devices"] == 2048
    for end in ("low", "high"):
        assert found["days"][end] == pytest.approx(found["step_seconds"][end] * found["steps"] / 86_400)
        assert found["device_hours"][end] == pytest.approx(24 * 2048 * found["days"][end])
    inside = found["inside_nodes"]
    assert inside["exchange_seconds"]["high"] < found["exchange_seconds"]["low"]
    assert inside["gradient_seconds"]["low"] > 2 * found["gradient_seconds"]["low"]
    assert found["days"]["low"] < 54.2 < found["days"]["high"]
    few = planned("olmoe-1b-7b", device="h100", ranks=8, train_tokens="1B")["training"]
    assert few["devices"] == 8 and few["step_tokens"] == 4 * 4096 * 8 and "inside_nodes" not in few


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"nodes": 2}, "nodes is 2, redundant 0, and ranks is 1"),
        ({"redundant": 2}, "add --ranks"),
        ({"ranks": 8, "nodes": 3}, "the nodes must divide the ranks evenly"),
        ({"ranks": 8, "redundant": -8}, "redundant is -8; it must not be negative"),
        ({"ranks": 8, "nodes": 0}, "nodes is 0; it must be positive"),
        ({"ranks": 8, "placement": "best"}, "placement is 'best'"),
        ({"train_step": "4M"}, "add --train-tokens"),
        ({"train_tokens": "1B", "train_step": "0"}, "train_step is '0'"),
        ({"train_tokens": "1B", "device": "h100", "devices": 12, "ranks": 8}, "or a multiple"),
    ],
)
def test_ranks_that_do_not_go_together(words: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        PlanOptions(**words)  # type: ignore[arg-type]

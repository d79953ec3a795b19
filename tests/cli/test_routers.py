"""`moiety routers`: the registry as a list, and each entry's own words."""

from __future__ import annotations

import dataclasses

import pytest

from moiety.config import MoEConfig
from moiety.moe.losses import LOSSES
from moiety.moe.routers import AROUND, ROUTERS, from_config, options_of
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions
from tests.cli.conftest import Call

KEYS = {
    "name", "kind", "summary", "paper", "causal", "experts_per_token", "options", "config", "flags",
}  # fmt: skip


def test_json_has_all(call: Call) -> None:
    said = call("routers", "--json")
    assert said.code == 0 and said.err == "" and all(set(entry) == KEYS for entry in said.json)
    by_kind = {
        kind: [entry["name"] for entry in said.json if entry["kind"] == kind]
        for kind in ("router", "around", "layer")
    }
    assert by_kind == {"router": [*ROUTERS], "around": [*AROUND], "layer": ["soft_moe"]}
    entries = {entry["name"]: entry for entry in said.json}
    for name, kind in ROUTERS.items():
        entry = entries[name]
        assert (entry["summary"], entry["paper"], entry["causal"]) == (kind.summary, kind.paper, kind.causal)
        assert entry["options"] == options_of(kind)
    assert [entries[name]["experts_per_token"] for name in ("softmax", "switch", "gshard", "relu")] == [
        "k", 1, 2, "varies",
    ]  # fmt: skip
    assert entries["soft_moe"]["paper"] == "2308.00951" and not entries["soft_moe"]["causal"]
    assert not entries["expert_choice"]["causal"] and entries["hash"]["options"]["salt"] == 0


def test_options_named_are_options_there_are(call: Call) -> None:
    known = {field.name for field in dataclasses.fields(MoEConfig)}
    flags = {field.name for kind in (ModelOptions, TrainOptions) for field in dataclasses.fields(kind)}
    for entry in call("routers", "--json").json:
        assert set(entry["config"]) <= known, entry
        words = [word.strip(",") for word in entry["flags"].split() if word.startswith("--")]
        assert {word[2:].replace("-", "_") for word in words} <= flags, entry
        if entry["kind"] == "router":
            k = entry["experts_per_token"] if isinstance(entry["experts_per_token"], int) else 2
            given = tuple(f"{name}={value}" for name, value in entry["options"].items())
            from_config(
                MoEConfig(experts=4, experts_per_token=k, d_ff=8, router=entry["name"], router_options=given)
            )


@pytest.mark.parametrize("columns", [40, 100])
def test_the_list_fits(columns: int, call: Call) -> None:
    said = call("routers", columns=columns)
    assert said.code == 0 and said.err == ""
    assert max(map(len, said.out.splitlines())) <= columns
    flat = " ".join(said.out.split())
    for name, kind in {**ROUTERS, **AROUND}.items():
        assert f" {name} {' '.join(kind.summary.split())}" in flat, name
    assert flat.index("routers ") < flat.index("around a router") < flat.index("soft_moe no choice")


@pytest.mark.parametrize("name", [*ROUTERS, *AROUND, "soft_moe"])
@pytest.mark.parametrize("columns", [40, 100])
def test_each_explains_itself(name: str, columns: int, call: Call) -> None:
    said = call("routers", name, columns=columns)
    assert said.code == 0 and said.err == ""
    lines = said.out.splitlines()
    assert lines[0].startswith(f"{name} (") and max(map(len, lines)) <= columns
    assert "experts per token:" in said.out and len(said.out) > 150
    assert not {"Args:", "Raises:", "Returns:"} & set(said.out.split())
    assert "\n\n\n" not in said.out and not said.out.endswith("\n\n")
    assert [entry["name"] for entry in call("routers", name, "--json").json] == [name]


def test_arguments_and_options_are_told(call: Call) -> None:
    out = call("routers", "sigmoid").out
    assert "  scale: Factor on the weights after that; 2.5 in DeepSeek-V3.\n" in out
    assert "options of the model: experts_per_token, renormalize, scale" in out
    assert "router_options: p=0.4, most=0, renormalize=False" in call("routers", "top_p").out
    assert "may depend on later ones" in call("routers", "expert_choice").out
    assert "moiety train: --explore, --router-warmup" in call("routers", "explore").out


def test_losses(call: Call) -> None:
    said = call("routers", "losses", "--json")
    assert said.code == 0 and [entry["name"] for entry in said.json] == [*LOSSES]
    assert all(len(entry["summary"]) > 20 for entry in said.json)
    table = call("routers", "losses", columns=40)
    assert table.code == 0 and max(map(len, table.out.splitlines())) <= 40
    assert all(f"  {name} " in table.out for name in LOSSES)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("sofmax", "softmax"), ("losess", "losses"), ("soft-moe", "soft_moe"), ("xyzzy", "moiety routers")],
)
def test_an_unknown_name(name: str, meant: str, call: Call) -> None:
    call("routers", name).assert_refused(2, repr(name), hint=meant)

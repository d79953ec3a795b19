"""`moiety models`: every row of the registry, exact counts, and no number of ours for a closed model."""

from __future__ import annotations

import pytest

from moiety import cost, registry
from moiety.moe import routers
from moiety.moe.routers import TopK
from tests.cli.conftest import Call


def test_json_is_the_registry(call: Call) -> None:
    said = call("models", "--json")
    assert said.code == 0 and said.err == ""
    rows = {row["name"]: row for row in said.json}
    assert list(rows) == [*registry.REGISTRY, *registry.NOT_YET, *registry.UNDISCLOSED]
    for name in registry.REGISTRY:
        counts = cost.parameters(registry.lookup(name))
        assert (rows[name]["status"], rows[name]["total"]) == ("open", counts.total)
        assert rows[name]["active"] == counts.active
    assert rows["qwen3-next-80b-a3b"]["total"] == 79_674_391_296
    assert rows["deepseek-v3"]["experts"] == "8 of 256" and rows["mistral-7b"]["experts"] == "dense"


def test_what_an_entry_does_not_know_is_said(call: Call) -> None:
    rows = {row["name"]: row for row in call("models", "--json").json}
    told = {name for name, row in rows.items() if row.get("unknown")}
    assert told == {"phi-3.5-moe", "grok-2", "llama-4-scout", "hunyuan-a13b"}
    for name in told:
        assert registry.lookup_decoder(name).attention.rope is None
    grok = registry.lookup_decoder("grok-2")
    assert grok.moe is not None and routers.from_config(grok.moe) == TopK(
        2, renormalize=False, group_best=2, cap=30.0
    )
    assert (grok.attention.logit_cap, grok.logits_cap) == (30.0, 50.0)
    shown = "".join(call("models").out.split())
    assert "phi-3.5-moe:unknownhere:thetwotablesoflongropefactors" in shown


def test_closed_models_have_reports_and_no_sizes(call: Call) -> None:
    rows = {row["name"]: row for row in call("models", "--json").json}
    for name in ("gpt-4", "gpt-4-turbo", "grok-3", "gemini-1.5-pro", "o1-preview"):
        row = rows[name]
        assert (row["status"], row["total"], row["active"]) == ("undisclosed", None, None)
        assert row["reports"] and all(one["said"] and one["by"] and one["date"] for one in row["reports"])


@pytest.mark.parametrize("columns", [40, 70, 150])
def test_every_name_is_shown_and_nothing_is_too_wide(columns: int, call: Call) -> None:
    said = call("models", columns=columns)
    assert said.code == 0
    assert max(map(len, said.out.splitlines())) <= columns
    joined = "".join(said.out.split())
    for name in (*registry.NOT_YET, *registry.UNDISCLOSED, *(registry.REGISTRY if columns != 70 else ())):
        assert name in joined, name
    assert "unconfirmed" in said.out
    assert ("mistralai/Mixtral-8x7B-v0.1" in said.out) == (columns == 150)
    assert "(OpenAI'sreport,arXiv2303.08774,2023-03)" in joined


def test_no_argument_is_taken(call: Call) -> None:
    call("models", "mixtral-8x7b").assert_refused(2, "mixtral-8x7b")

"""`moiety params`: the counts of `moiety.cost`, for names and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiety import cost, registry
from tests.cli.conftest import Call


def test_json_is_what_cost_says(call: Call) -> None:
    counts = cost.parameters(registry.lookup("mixtral-8x7b"))
    said = call("params", "mixtral-8x7b", "--json")
    assert said.code == 0 and said.err == ""
    assert said.json["total"] == counts.total == 46_702_792_704
    assert said.json["active"] == counts.active
    assert said.json["components"] == dict(counts.components)
    assert sum(said.json["components"].values()) == counts.total
    assert said.json["active_percent"] == pytest.approx(27.6, abs=0.1)


@pytest.mark.parametrize("columns", [40, 70, 100])
def test_the_table_fits(columns: int, call: Call) -> None:
    said = call("params", "mixtral-8x7b", columns=columns)
    assert said.code == 0 and said.err == ""
    assert "46,702,792,704" in said.out.replace("\n", "")
    table = said.out.partition("active per token")[0]
    assert max(map(len, table.splitlines())) <= columns


def test_a_checkpoint_folder(call: Call, trained: Path) -> None:
    (folder,) = (trained / "checkpoints").iterdir()
    said = call("params", folder, "--json")
    from moiety.model.checkpoint import load

    assert said.code == 0 and said.json["total"] == sum(p.numel() for p in load(folder).parameters())


def test_a_folder_that_holds_no_model(call: Call, tmp_path: Path) -> None:
    call("params", tmp_path).assert_refused(1, "config.json")
    (tmp_path / "config.json").write_text("{")
    call("params", tmp_path).assert_refused(1, "config.json")


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "mixtral-8x7"])
def test_an_unknown_name(name: str, call: Call) -> None:
    said = call("params", name)
    said.assert_refused(2, name)
    assert "hint: " in said.err


def test_what_is_known_but_not_countable_says_why(call: Call) -> None:
    for name in [*registry.UNDISCLOSED, *registry.NOT_YET]:
        said = call("params", name)
        assert said.code == 2 and name in said.err and said.out == "", said


def test_every_known_model_can_be_counted(call: Call) -> None:
    assert len(registry.REGISTRY) > 20
    for name in registry.REGISTRY:
        assert call("params", name, "--json").json["total"] > 0, name

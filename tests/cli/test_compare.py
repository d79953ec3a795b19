"""`moiety compare`: twins over seeds, as a table and as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Call, small


def test_json_has_every_seed(call: Call, texts: list[str], tmp_path: Path) -> None:
    words = small(steps=2)
    said = call("compare", *texts, "--out", tmp_path, *words, "--seeds", 2, "--seed", 4, "--json")
    assert said.code == 0
    figures = said.json["figures"]
    assert said.json["seeds"] == 2 and set(figures) == {"moe", "dense"}
    routing = {"max_vio", "max_vio_global", "dead", "dropped", "experts_per_token"}
    assert set(figures["moe"]) == set(figures["dense"]) | routing
    for values in figures.values():
        assert set(values) - routing == {"mean", "animals", "code", "tokens_per_second"}
        assert all(len(spread) == 2 for spread in values.values())
        assert all(min(spread) > 0 for name, spread in values.items() if name not in routing)
        for animals, code, mean in zip(values["animals"], values["code"], values["mean"], strict=True):
            assert mean == pytest.approx((animals + code) / 2)
        assert values["mean"][0] != values["mean"][1], "another seed is another run"
    single = call("compare", *texts, "--out", tmp_path, *words, "--seeds", 1, "--seed", 5, "--json")
    assert single.json["figures"]["moe"]["code"] == figures["moe"]["code"][1:], (
        "each seed is a run of its own"
    )


@pytest.mark.parametrize("columns", [40, 100])
def test_the_table(columns: int, call: Call, texts: list[str], tmp_path: Path) -> None:
    said = call("compare", *texts, "--out", tmp_path, *small(steps=1), "--seeds", 2, columns=columns)
    assert said.code == 0 and said.out.count("±") >= 6 and "animals" in said.out
    *table, host = said.out.splitlines()
    assert "torch" in host and max(map(len, table)) <= columns


def test_what_cannot_be_compared(call: Call, texts: list[str], tmp_path: Path) -> None:
    words = [*texts, "--out", tmp_path / "run"]
    call("compare", *words, *small(experts=0)).assert_refused(2, "dense", hint="experts")
    call("compare", *words, *small(), "--seeds", 0).assert_refused(2, "seeds is 0")
    call("compare", tmp_path / "absent.txt", *small()).assert_refused(1, "absent.txt")


def test_routers_against_each_other(call: Call, texts: list[str], tmp_path: Path) -> None:
    words = [*texts, "--out", tmp_path, *small(steps=3), "--seeds", 2]
    said = call("compare", *words, "--routers", "softmax, hash,relu", "--json")
    figures = said.json["figures"]
    assert said.code == 0 and list(figures) == ["softmax", "hash", "relu"]
    assert all(len(spread) == 2 for one in figures.values() for spread in one.values())
    assert figures["hash"]["experts_per_token"] == [2.0, 2.0] != figures["relu"]["experts_per_token"]
    page = (tmp_path / "routers.html").read_text()
    assert "softmax" in page and "Plotly" in page and "<script src=" not in page
    assert said.err.rstrip().endswith("routers.html")


@pytest.mark.parametrize("columns", [40, 120])
def test_the_table_of_routers(columns: int, call: Call, texts: list[str], tmp_path: Path) -> None:
    words = [*texts, "--out", tmp_path, *small(steps=1), "--seeds", 1, "--routers", "switch,base"]
    said = call("compare", *words, columns=columns)
    *table, _ = said.out.splitlines()
    assert said.code == 0 and max(map(len, table)) <= columns
    assert all(word in said.out for word in ("switch", "base", "MaxVio", "dropped", "tok/s"))


@pytest.mark.parametrize(
    "routers, named",
    [("softmax,softmin", "softmin"), ("softmax,softmax", "twice"), ("gone:Router", "gone")],
)
def test_wrong_routers_are_refused_before_training(
    routers: str, named: str, call: Call, texts: list[str], tmp_path: Path
) -> None:
    call("compare", *texts, "--out", tmp_path, *small(), "--routers", routers).assert_refused(
        2, named, hint=""
    )

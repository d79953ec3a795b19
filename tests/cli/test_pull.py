"""`moiety pull`: what it prints, and what is no model of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moiety.errors import StorageError
from tests.cli.conftest import Call


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has every model; the list gets what it was asked for."""
    asked: list[dict[str, Any]] = []
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 2000)

    def resolve(name: str, **given: Any) -> Path:
        asked.append({"name": name, **given})
        return folder

    monkeypatch.setattr("moiety.model.hub.resolve", resolve)
    return asked


def test_the_folder_is_the_result(call: Call, fetched: list[dict[str, Any]]) -> None:
    said = call("pull", "owner/model", "--revision", "v1")
    assert said.code == 0 and said.out.strip().endswith("snapshot") and said.out.count("\n") == 1
    assert "2 files, 2kB" in said.err
    assert fetched == [{"name": "owner/model", "revision": "v1", "weights": True}]
    said = call("pull", "owner/model", "--no-weights", "--json")
    assert said.json["bytes"] == 2002 and said.json["files"] == {"config.json": 2, "model.safetensors": 2000}
    assert fetched[1] == {"name": "owner/model", "revision": None, "weights": False}


@pytest.mark.parametrize("name", ["mixtral-8x7b", "a/b/c", "https://huggingface.co/a/b", "../x", ""])
def test_what_is_no_name_of_the_hub(name: str, call: Call, fetched: list[dict[str, Any]]) -> None:
    call("pull", name).assert_refused(2, repr(name), hint="owner/name")
    assert not fetched


def test_a_folder_here(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    call("pull", "owner/model").assert_refused(2, "a folder of that name is here")


def test_the_hubs_refusals_pass_through(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **given: Any) -> Path:
        raise StorageError(f"{name} is gated", hint="accept its terms")

    monkeypatch.setattr("moiety.model.hub.resolve", refuse)
    call("pull", "owner/model").assert_refused(1, "gated", hint="accept its terms")

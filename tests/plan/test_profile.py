"""Profiles and histories: there and back, and everything that a damaged one can be."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from moiety.errors import FormatError, MoietyError, StorageError
from moiety.plan.profile import (
    Figure,
    append_history,
    default_path,
    read_history,
    read_profile,
    write_profile,
)
from tests.plan.profiles import made


def test_there_and_back(tmp_path: Path) -> None:
    write_profile(made(), tmp_path / "deep" / "p.json")
    assert read_profile(tmp_path / "deep" / "p.json") == made()
    assert made().best_read_rate == Figure(30e9, 22.5e9, 37.5e9)
    assert made().disk_rate(7e6) == Figure(2e9, 1.5e9, 2.5e9) and made(disk={}).disk_rate(1) is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"read_rate": {}},
        {"read_rate": {"2": [1.0, 2.0, 3.0]}},
        {"read_rate": {"2": [0, 0, 0]}},
        {"read_rate": [1, 2]},
        {"disk": {"1024": [1.0, 1.0]}},
        {"overhead": {"packed": {}}},
        {"attention": {"fp32": [1, 1, 1]}},
        {"experts": {"fp32": {"1": [1, 1, 1]}}},
        {"experts": {"fp32": {"1": [-1, -2, 1]}}},
        {"linear": {}},
        {"process_bytes": {"packed": 3}},
        {"threads": "two"},
        {"surplus": 1},
    ],
)
def test_damaged_profiles_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    write_profile(made(), file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(FormatError) as failed:
        read_profile(file)
    assert str(file) in failed.value.message and "--measure" in (failed.value.hint or "")


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "null", '{"version": 1}', '{"version": NaN}'):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(FormatError):
            read_profile(tmp_path / "p.json")
    with pytest.raises(MoietyError):
        read_profile(tmp_path / "absent.json")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path().parent == tmp_path / "moiety" and default_path().suffix == ".json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path().parent == tmp_path / ".cache" / "moiety"


def write_many(path: Path, word: str) -> None:
    for number in range(200):
        append_history({"word": word, "number": number, "filling": "x" * 300}, path)


def test_two_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "profile-a.b.json"
    assert read_history(path) == []
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=write_many, args=(path, word)) for word in ("one", "two")]
    for one in both:
        one.start()
    for one in both:
        one.join()
        assert one.exitcode == 0
    lines = read_history(path)
    for word in ("one", "two"):
        assert [line["number"] for line in lines if line["word"] == word] == list(range(200))


def test_a_history_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    append_history({"a": 1}, path)
    history = tmp_path / "p.history.jsonl"
    history.write_text(history.read_text() + '{"cut": ')
    with pytest.raises(FormatError, match=r"p\.history\.jsonl"):
        read_history(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        append_history({"a": 1}, tmp_path / "file" / "p.json")

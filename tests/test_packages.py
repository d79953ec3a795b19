"""What is said about a package that is not there, or there and broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moiety.errors import DependencyError
from moiety.packages import need


def test_what_is_there_comes_back() -> None:
    assert need("json.decoder", "this test", "nothing") is sys.modules["json.decoder"]


@pytest.mark.parametrize("name", ["moiety_absent", "json.moiety_absent"])
def test_what_is_missing_is_named_with_how_to_get_it(name: str) -> None:
    with pytest.raises(DependencyError) as told:
        need(name, "the page", "moiety[report]")
    assert told.value.message == f"the page needs {name}, which is not installed"
    assert told.value.hint == "pip install 'moiety[report]'"


def test_what_another_module_misses_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moiety_wants.py").write_text("import moiety_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match="needs moiety_absent, which is not installed"):
        need("moiety_wants", "a test", "moiety_absent")


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moiety_broken.py").write_text("raise ImportError('undefined symbol: gone')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        DependencyError, match="needs moiety_broken, which cannot be imported: undefined symbol: gone"
    ):
        need("moiety_broken", "a test", "moiety_broken")

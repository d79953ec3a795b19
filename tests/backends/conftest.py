"""What tests of the C kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moiety.backends import cpu
from tests.backends.builds import tried


@pytest.fixture(params=tried())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set that this machine has and that is tried, one after the other."""
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, request.param)
    cpu.level.cache_clear()
    yield request.param
    monkeypatch.undo()
    cpu.level.cache_clear()

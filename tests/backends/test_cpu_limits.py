"""What the machine can do at most: all of it is done, and the figures are of this world."""

from __future__ import annotations

import pytest
import torch

from moiety.backends import cpu, cpu_limits
from moiety.errors import DependencyError
from tests.backends.builds import tried


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_rate_of_multiplications(integers: bool, threads: int, level: str) -> None:
    torch.set_num_threads(threads)
    try:
        rate = cpu_limits.multiply_rate(integers=integers, seconds=0.01)
    finally:
        torch.set_num_threads(1)
    assert 1e6 < rate < 1e15, rate  # a machine busy with other things takes its time


def test_wide_registers_multiply_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {}
    for level in tried():
        monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
        cpu.level.cache_clear()
        rates[level] = max(cpu_limits.multiply_rate(integers=True, seconds=0.01) for _ in range(3))
    cpu.level.cache_clear()
    if "avx512" in rates:
        assert rates["avx512"] > rates["portable"], rates


@pytest.mark.skipif(not cpu.levels(), reason="the kernels are not compiled here")
def test_reading_takes_tensors_of_any_size() -> None:
    parts = [torch.zeros(size, dtype=torch.uint8) for size in (0, 1, 255, 257, 600_001)]
    cpu_limits.read_all([*parts, torch.ones(70_001, dtype=torch.bfloat16)[1:]])
    cpu_limits.read_all([])


def test_without_kernels_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    with pytest.raises(DependencyError, match="no limit"):
        cpu_limits.multiply_rate(integers=False)
    with pytest.raises(DependencyError, match="no limit"):
        cpu_limits.read_all([])

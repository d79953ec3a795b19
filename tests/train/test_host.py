"""What is said about this machine is so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from moiety.train import host


def test_memory_is_counted_in_bytes() -> None:
    before = host.peak_memory_bytes()
    assert 20e6 < before < 1e12, "a process with torch takes tens of megabytes at least"
    block = torch.ones(64_000_000, dtype=torch.uint8) + 1
    assert host.peak_memory_bytes() >= before
    assert int(block[-1]) == 2


def test_features_are_those_of_the_processor() -> None:
    features = host.cpu_features()
    assert set(features) == set(host.FEATURES) and all(type(there) is bool for there in features.values())
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        assert features["avx512f"] and features["avx2"]
    if capability == "AVX2":
        assert features["avx2"]


def test_the_host_line_is_one_line_with_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    line = host.host_line()
    assert "\n" not in line and host.cpu_name() and host.cpu_name() in line
    assert f"torch {torch.__version__}" in line and line.startswith(f"{len(os.sched_getaffinity(0))} cores")
    monkeypatch.setattr(host, "_cpuinfo", dict)
    assert not any(host.cpu_features().values())
    assert f"torch {torch.__version__}" in host.host_line(), "it holds where /proc/cpuinfo is not there"


def test_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose peak nothing has raised before, and whose allocator may be changed: both are counted and said."""
    code = (
        "from moiety.train.host import keep_freed_memory, peak_memory_bytes as peak\n"
        "a = peak(); b = b'x' * 300_000_000; c = peak(); del b; print(a, c, peak(), keep_freed_memory())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after, kept = found.stdout.split()
    assert 280e6 < int(during) - int(before) < 320e6 and abs(int(after) - int(during)) < 5e6
    is_glibc = sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION") is not None
    assert kept == str(is_glibc)
    monkeypatch.setattr(host.sys, "platform", "darwin")
    assert host.keep_freed_memory() is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize(("largest", "kept_mb"), [(0, (100, 130)), (8_000_000, (0, 20))])
def test_what_is_larger_than_is_said_goes_back(largest: int, kept_mb: tuple[int, int]) -> None:
    code = (
        "from moiety.train.host import keep_freed_memory\n"
        "def now(): return int([x for x in open('/proc/self/status') if x.startswith('VmRSS')][0].split()[1]) / 1e3\n"
        f"assert keep_freed_memory({largest})\n"
        "before = now(); large = b'x' * 100_000_000; after = b'y' * 100_000; during = now(); del large\n"
        "print(during - before, now() - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    during, left = map(float, found.stdout.split())
    assert 90 < during < 130 and kept_mb[0] - 10 <= left <= kept_mb[1]

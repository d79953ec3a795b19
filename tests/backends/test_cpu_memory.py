"""Large pages: what is in them stays what it was, and the system says that they are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moiety.backends.cpu_memory import HUGE_BYTES, into_huge_pages


def huge_bytes() -> int:
    """Bytes of this process in large pages, by the system."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def test_content_is_the_same_and_the_pages_are_there() -> None:
    tensor = torch.arange(5 * HUGE_BYTES // 8)
    kept, before = tensor.sum(), huge_bytes() if sys.platform.startswith("linux") else 0
    moved = into_huge_pages(tensor)
    assert tensor.sum() == kept and torch.equal(tensor[-3:], torch.arange(len(tensor) - 3, len(tensor)))
    if moved == 0:
        pytest.skip("this system gives no large pages")
    assert moved >= 3 * HUGE_BYTES and huge_bytes() >= before + moved - HUGE_BYTES


def test_small_memory_is_left_alone() -> None:
    assert into_huge_pages(torch.zeros(100)) == 0
    assert into_huge_pages(torch.zeros(0)) == 0
    assert into_huge_pages(torch.empty(1 << 24, device="meta")) == 0

"""One load in a process of its own: python bench/_load_child.py ours|transformers SMALL LARGE; prints JSON.

SMALL is loaded first, so that imports and first calls are over when LARGE is measured.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn

__all__ = ["main"]


def load(method: str, path: str) -> nn.Module:
    """A model, each weight of the type it is stored in."""
    if method == "ours":
        from moiety.model.checkpoint import load as load_ours

        return load_ours(path)
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    return model


def peak_bytes() -> int:
    """The most memory this program ever had; getrusage would begin with that of the one that started it."""
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match
    return 1024 * int(match[1])


def main() -> int:
    """Measure, then add up all weights as words of four, which does not depend on whose rows stand behind whose."""
    method, small, large = sys.argv[1:]
    load(method, small)
    before = peak_bytes()
    begun = time.perf_counter()
    model = load(method, large)
    seconds = time.perf_counter() - begun
    peak = peak_bytes() - before
    tensors = [one.detach() for one in model.parameters()]
    bits = sum(int(one.reshape(-1).view(torch.int64).sum()) for one in tensors) % 2**64
    used = time.perf_counter() - begun
    size = sum(one.nbytes for one in tensors)
    print(json.dumps({"seconds": seconds, "used": used, "peak": peak, "size": size, "bits": bits}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What torch and oneDNN read from the environment when they are imported, for commands that need it otherwise."""

from __future__ import annotations

import os

__all__ = ["LARGE_PAGES", "ONEDNN_CACHE", "TORCH_CACHE", "keep_few_shapes", "use_large_pages"]

# oneDNN keeps code for each shape of a product, 1024 of them, and torch keeps what it made of it once more: hundreds of
# megabytes where every step has other numbers of rows.
TORCH_CACHE, ONEDNN_CACHE = "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def keep_few_shapes(*caches: str) -> None:
    """Keep 64 of them, unless the environment says otherwise; torch must not have been imported yet.

    Args:
        caches: In which of the two. Training asks for its shapes again and again, and compiling takes longer than
            multiplying; without torch's cache it is no slower (LOG.md).
    """
    for variable in caches:
        os.environ.setdefault(variable, "64")


def use_large_pages() -> None:
    """Tensors of 2 MiB and more in pages of that size, where the system has them and the environment says nothing.

    New memory is then cleared in a tenth of the time, so that a step can give back what it freed (`train/host.py`).
    """
    os.environ.setdefault(LARGE_PAGES, "1")

"""Fewer shapes in oneDNN's caches, for commands whose products have any number of rows."""

from __future__ import annotations

import os

__all__ = ["ONEDNN_CACHE", "TORCH_CACHE", "keep_few_shapes"]

# oneDNN keeps code for each shape of a product, 1024 of them, and torch keeps what it made of it once more: hundreds of
# megabytes where every step has other numbers of rows. Read when torch is imported.
TORCH_CACHE, ONEDNN_CACHE = "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def keep_few_shapes(*caches: str) -> None:
    """Keep 64 of them, unless the environment says otherwise; torch must not have been imported yet.

    Args:
        caches: In which of the two. Training asks for its shapes again and again, and compiling takes longer than
            multiplying; without torch's cache it is no slower (LOG.md).
    """
    for variable in caches:
        os.environ.setdefault(variable, "64")

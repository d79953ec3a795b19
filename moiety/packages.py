"""Packages that not every installation has."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from moiety.errors import DependencyError

__all__ = ["need"]


def need(module: str, purpose: str, install: str) -> Any:
    """Import `module`, or say what is missing and how to get it.

    Args:
        module: Its full name; ours too, where what it imports is optional.
        purpose: What wants it, the subject of a sentence.
        install: What to give to pip.

    Raises:
        DependencyError: it, or what it imports, is not installed or does not work.
    """
    try:
        return import_module(module)
    except ImportError as error:
        state = (
            "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
        )
        raise DependencyError(
            f"{purpose} needs {error.name or module}, which {state}", hint=f"pip install '{install}'"
        ) from error

"""Routers of the user's own: imported because a flag names them, never because a file does."""

from __future__ import annotations

import importlib
import sys

from moiety.errors import UsageError

__all__ = ["import_own_routers"]


def import_own_routers(*names: str) -> None:
    """Import the module of every `module:Class` among `names`, from the working directory or what is installed.

    Raises:
        UsageError: there is no such module, or it fails.
    """
    for name in names:
        module, colon, _ = name.partition(":")
        if not colon or module in sys.modules:
            continue
        sys.path.insert(0, "")
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError) as error:
            raise UsageError(
                f"router {name!r}: module {module!r} cannot be imported: {error}",
                hint="run from the folder that holds it, or install it",
            ) from error
        finally:
            sys.path.remove("")

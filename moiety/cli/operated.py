"""What `moiety prune` and `moiety merge` do alike: run, and show the receipt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moiety.cli.output import print_json, talk
from moiety.cli.own import import_own_routers
from moiety.train.expert_options import SurgeryOptions
from moiety.train.options import HeldOutOptions

if TYPE_CHECKING:
    from moiety.moe.surgery import Kind

__all__ = ["operated"]


def operated(
    kind: Kind,
    source: str,
    target: str,
    texts: Sequence[str],
    options: SurgeryOptions,
    text: HeldOutOptions,
    *,
    align: bool = True,
    router: str = "",
    dry_run: bool,
    json: bool,
) -> int:
    """Operate on a checkpoint and print the receipt."""
    from moiety.infer.open import find_checkpoint
    from moiety.train.surgery import operate

    import_own_routers(router)
    where = None if dry_run else target
    said = operate(kind, find_checkpoint(source), where, texts, options, text, align=align, say=talk().print)
    if json:
        print_json({"path": where, **said})
    else:
        _print(said, where)
    return 0


def _print(said: dict[str, Any], target: str | None) -> None:
    from moiety.cli.perplexity import print_rows

    print(f"by {said['by']}: {said['criterion']}")
    for layer, was, now in said["experts"]:
        if was != now:
            print(f"  layer {layer}: {was} -> {now} experts")
    before, after = said["parameters"]
    print(f"parameters: {before:,} -> {after:,} ({100 * (after / before - 1):+.1f} %)")
    print_rows(said["quality"])
    print(f"written: {target}, {said['layout']}" if target else "dry run: nothing was written")

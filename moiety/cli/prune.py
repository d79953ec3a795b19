"""`moiety prune`: fewer experts, and a receipt."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moiety.cli.operated import operated
from moiety.cli.output import command
from moiety.train.expert_options import SurgeryOptions
from moiety.train.options import HeldOutOptions

__all__ = ["app"]

app = command("moiety prune", "Drop experts that matter least, with what that costs.")


@app.default
def prune(
    source: str,
    target: str,
    /,
    *texts: str,
    options: Annotated[SurgeryOptions, Parameter(name="*")] = SurgeryOptions(),
    text: Annotated[HeldOutOptions, Parameter(name="*")] = HeldOutOptions(),
    dry_run: Annotated[bool, Parameter(negative="", help="decide and score, but write nothing")] = False,
    json: Annotated[bool, Parameter(negative="", help="print the receipt as JSON")] = False,
) -> int:
    """Drop experts, from what they do on text or from a trace; docs/surgery.md has the criteria.

    Parameters
    ----------
    source
        A checkpoint or run folder, or owner/name on the hub; not packed.
    target
        A folder that is new or was written by this program.
    texts
        To decide by and to score, named as for `moiety train`; none means the default corpus.
    """
    return operated("prune", source, target, texts, options, text, dry_run=dry_run, json=json)

"""`moiety merge`: fewer experts, and a receipt."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moiety.cli.operated import operated
from moiety.cli.output import command
from moiety.train.expert_options import SurgeryOptions
from moiety.train.options import HeldOutOptions

__all__ = ["app"]

app = command("moiety merge", "Merge experts that are alike, with what that costs.")


@app.default
def merge(
    source: str,
    target: str,
    /,
    *texts: str,
    options: Annotated[SurgeryOptions, Parameter(name="*")] = SurgeryOptions(),
    text: Annotated[HeldOutOptions, Parameter(name="*")] = HeldOutOptions(),
    align: Annotated[bool, Parameter(help="match neurons before taking the mean of weights")] = True,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    dry_run: Annotated[bool, Parameter(negative="", help="decide and score, but write nothing")] = False,
    json: Annotated[bool, Parameter(negative="", help="print the receipt as JSON")] = False,
) -> int:
    """Merge experts, from what they answer on text; the router goes on telling them apart. docs/surgery.md has more.

    Parameters
    ----------
    source
        A checkpoint or run folder, or owner/name on the hub; not packed.
    target
        A folder that is new or was written by this program.
    texts
        To decide by and to score, named as for `moiety train`; none means the default corpus.
    """
    return operated(
        "merge", source, target, texts, options, text, align=align, router=router, dry_run=dry_run, json=json
    )

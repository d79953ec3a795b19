"""`moiety pull`: fetch a model from the hub into its cache."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moiety.cli.output import command, print_json, short, talk
from moiety.errors import UsageError

__all__ = ["app"]

app = command("moiety pull", "Fetch a model of the Hugging Face hub into its cache.")


@app.default
def pull(
    name: str,
    /,
    *,
    revision: Annotated[str, Parameter(help="branch, tag or commit; empty is the main branch")] = "",
    weights: Annotated[bool, Parameter(help="also the weights, not only config and tokenizer")] = True,
    json: Annotated[bool, Parameter(negative="", help="print JSON")] = False,
) -> int:
    """Fetch what is not there yet and print the folder. Only safetensors come, and never code.

    Parameters
    ----------
    name
        The model, as owner/name.
    """
    from moiety.model import hub

    if not hub.is_hub_name(name):
        raise UsageError(
            f"{name!r} is not a model of the hub, or a folder of that name is here",
            hint="give it as owner/name, such as allenai/OLMoE-1B-7B-0924",
        )
    folder = hub.resolve(name, revision=revision or None, weights=weights)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    if json:
        print_json({"name": name, "path": str(folder), "bytes": sum(sizes.values()), "files": sizes})
        return 0
    print(folder)
    talk().print(f"{len(sizes)} files, {short(sum(sizes.values()))}B")
    return 0

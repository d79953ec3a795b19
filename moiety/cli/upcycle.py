"""`moiety upcycle`: a dense model, or several, made into a Mixture-of-Experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table, talk
from moiety.train.expert_options import UpcycleOptions

if TYPE_CHECKING:
    from moiety.train.upcycle import Receipt

__all__ = ["app"]

app = command(
    "moiety upcycle", "Make a Mixture-of-Experts of a dense model, with proof of what the method keeps."
)


@app.default
def upcycle(
    parent: str,
    target: str,
    /,
    *texts: str,
    merge: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            help="a further fine-tune of the same model: experts come from each in turn (2403.07816)",
        ),
    ] = (),
    options: Annotated[UpcycleOptions, Parameter(name="*")] = UpcycleOptions(),
    dtype: Annotated[
        Literal["", "fp32", "bf16", "fp16"], Parameter(help="of the weights; empty keeps the parent's")
    ] = "",
    sequences: Annotated[
        int, Parameter(help="most sequences of a domain, of 128 tokens each, for router kmeans")
    ] = 8,
    dry_run: Annotated[bool, Parameter(negative="", help="say what would be written, and stop")] = False,
    json: Annotated[bool, Parameter(negative="", help="print the receipt as JSON")] = False,
) -> int:
    """Before TARGET gets its name, its logits are compared with the parent's; a broken promise leaves nothing (exit 4).

    Parameters
    ----------
    parent
        A dense checkpoint folder, a .gguf file, or owner/name on the hub.
    target
        A folder that is new or was written by this program.
    texts
        Compared on besides random tokens, and for --router kmeans, where none means the default corpus.
    """
    import torch

    from moiety.model import hub
    from moiety.train import upcycle as work

    sources = [hub.resolve(source) for source in (parent, *merge)]
    tokens = None
    if not dry_run and (texts or options.router == "kmeans"):
        tokens = work.text_tokens(sources[0], texts, sequences)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    receipt = work.upcycle(
        sources, target, options, tokens_BS=tokens, dtype=dtypes.get(dtype), dry_run=dry_run
    )
    if json:
        from moiety.config import to_dict

        print_json({"path": None if dry_run else target, **to_dict(receipt)})
    else:
        _print(receipt, None if dry_run else target)
    return 0


def _print(receipt: Receipt, target: str | None) -> None:
    rows = [
        ["parameters of the parent", f"{receipt.total_before:,}"],
        ["parameters", f"{receipt.total_after:,}"],
        ["active for one token", f"{receipt.active_after:,}"],
        ["layers with experts", ", ".join(map(str, receipt.layers))],
        ["dtype", receipt.dtype],
        ["keeps the parent's function", "yes" if receipt.promised else "no"],
    ]
    for number, delta in enumerate(receipt.delta):
        of = f" of parent {number + 1}" if len(receipt.delta) > 1 else ""
        rows.append([f"largest difference of logits in float32{of}", f"{delta:.3g}"])
    if receipt.delta:
        rows.append(["largest logit", f"{receipt.largest_logit:.3g}"])
        rows.append(["float32 alone makes of the parent", f"{receipt.floor:.3g}"])
    if receipt.exact_delta is not None:
        rows.append(["largest difference in float64", f"{receipt.exact_delta:.3g}"])
    print_table("receipt", ["", "value"], rows)
    talk().print(f"{receipt.promise}; {receipt.written_as}")
    print(f"written: {target}" if target else "dry run: nothing was written")

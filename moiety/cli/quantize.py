"""`moiety quantize`: a model in fewer bits, with a receipt for every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table, short, talk
from moiety.errors import UsageError

if TYPE_CHECKING:
    from moiety.model.transformer import Transformer
    from moiety.quant.quantize import Policy, PolicyFunction, Receipt

__all__ = ["app"]

app = command("moiety quantize", "Pack a model's weights in fewer bits.")
PART = "another format for this part; none keeps it as it is"
CALIBRATION_SEQUENCES = 8  # of each domain


@app.default
def quantize(
    source: str,
    target: str,
    /,
    *texts: str,
    format: Annotated[
        str, Parameter(help="one for everything, int4-mixed, or part=format+part=format")
    ] = "int4-g32",
    experts: Annotated[str, Parameter(help=PART)] = "",
    shared: Annotated[str, Parameter(help=PART)] = "",
    dense: Annotated[str, Parameter(help=PART)] = "",
    attention: Annotated[str, Parameter(help=PART)] = "",
    head: Annotated[str, Parameter(help=PART)] = "",
    expert_bits: Annotated[
        float,
        Parameter(help="average bits of routed experts: some get int8-g32, as measured on texts; 0: none"),
    ] = 0.0,
    keep_blocks: Annotated[
        bool, Parameter(help="leave Q4_0, Q4_1, Q8_0 and mxfp4 blocks as they are stored")
    ] = True,
    dry_run: Annotated[bool, Parameter(negative="", help="write nothing")] = False,
    json: Annotated[bool, Parameter(negative="", help="print the receipt as JSON")] = False,
) -> int:
    """Routers, norms, biases and the embedding keep their precision. `docs/quantization.md` lists the formats.

    Parameters
    ----------
    source
        A checkpoint or run folder, a .gguf file, or owner/name on the hub.
    target
        A folder that is new or was written by this program.
    texts
        For --expert-bits, named as for `moiety train`; none means the default corpus.
    """
    from moiety.infer.open import find_checkpoint
    from moiety.model import checkpoint
    from moiety.model.convert import save_beside
    from moiety.quant.quantize import quantize as pack

    parts = {"experts": experts, "shared": shared, "dense": dense, "attention": attention, "head": head}
    place = find_checkpoint(source)
    if Path(target).resolve() == place.resolve():
        raise UsageError(f"{source} is source and target", hint="write somewhere else")
    policy = _policy(format, parts)
    model = checkpoint.load(place, packed=keep_blocks)
    chosen: PolicyFunction = _mixed(model, place, texts, policy, expert_bits) if expert_bits else policy
    receipt = pack(model, chosen)
    if not dry_run:
        save_beside(model, place, target)
    if json:
        sizes = {"bytes_before": receipt.bytes_before, "bytes_after": receipt.bytes_after}
        lines = [line._asdict() for line in receipt.lines]
        print_json({"path": None if dry_run else target, **sizes, "tensors": lines})
    else:
        _print(receipt, None if dry_run else target)
    return 0


def _policy(format: str, parts: dict[str, str]) -> Policy:
    import dataclasses

    from moiety.quant.quantize import policy_named

    given = {part: "" if form == "none" else form for part, form in parts.items() if form}
    return dataclasses.replace(policy_named(format), **given)


def _mixed(model: Transformer, place: Path, texts: tuple[str, ...], policy: Policy, bits: float) -> Any:
    """The policy with more bits for the experts that need them, measured on text."""
    from moiety.model.convert import read_tokenizer
    from moiety.quant.calibrate import calibrate
    from moiety.train.options import HeldOutOptions
    from moiety.train.run import held_out

    some = HeldOutOptions(batch=4, sequences=CALIBRATION_SEQUENCES)
    by_domain, _ = held_out(texts, read_tokenizer(place), model.config.max_positions, some)
    found = [(piece.tokens_BS, piece.targets_BS) for pieces in by_domain.values() for piece in pieces]
    talk().print(f"measuring experts on {sum(one.numel() for one, _ in found):,} tokens")
    return calibrate(model, found, low=policy.experts).policy(policy, bits=bits)


def _print(receipt: Receipt, target: str | None) -> None:
    rows = []
    for (kind, form), lines in receipt.by_kind().items():
        before, after = (sum(getattr(one, name) for one in lines) for name in ("bytes_before", "bytes_after"))
        worst = max(one.relative_error for one in lines)
        rows.append([f"{kind}, {form}", str(len(lines)), short(before), short(after), f"{100 * worst:.2f} %"])
    rows.append(["all", str(len(receipt.lines)), short(receipt.bytes_before), short(receipt.bytes_after), ""])
    print_table("bytes", ["part, format", "tensors", "before", "after", "largest error"], rows)
    print(f"written: {target}" if target else "dry run: nothing was written")

"""`moiety adapter`: look at an adapter, prove that it acts, or merge it into its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table, short, talk
from moiety.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from moiety.train.adapter_check import Verdict

__all__ = ["app"]

app = command("moiety adapter", "Show what an adapter adds, check that it acts, or merge it.")
PROMPT = (
    "The quick brown fox jumps over the lazy dog. In 1969, people walked on the moon; def f(x): return x + 1"
)


@app.default
def adapter(
    what: Literal["show", "check", "merge"],
    base: str,
    folder: str = "",
    target: str = "",
    /,
    *,
    prompt: Annotated[tuple[str, ...], Parameter(help="check: texts to look at; several may be given")] = (),
    requantize: Annotated[
        bool, Parameter(negative="", help="merge: round packed weights again, and say what that lost")
    ] = False,
    json: Annotated[bool, Parameter(negative="", help="print JSON")] = False,
) -> int:
    """Show says what can be adapted in BASE, or what FOLDER adapts; check ends with 4 if any of that adds nothing.

    Parameters
    ----------
    what
        show, check or merge.
    base
        A checkpoint or run folder, a .gguf file, or owner/name on the hub.
    folder
        The adapter, as `moiety` or PEFT wrote it.
    target
        merge: a folder that is new or was written by this program.
    """
    if (what != "show" and not folder) or bool(target) != (what == "merge"):
        raise UsageError(
            f"{what} wants {'BASE, ADAPTER and TARGET' if what == 'merge' else 'BASE and ADAPTER'}",
            hint="moiety adapter check MODEL ADAPTER; moiety adapter merge MODEL ADAPTER NEW_MODEL",
        )
    if (prompt and what != "check") or (requantize and what != "merge"):
        raise UsageError("--prompt is for check, --requantize for merge")
    if what == "merge":
        return _merge(base, folder, target, requantize, json=json)
    return _check(base, folder, prompt, json=json) if what == "check" else _show(base, folder, json=json)


def _show(base: str, folder: str, *, json: bool) -> int:
    from moiety.infer.open import find_checkpoint, load
    from moiety.model.adapters import places
    from moiety.model.transformer import Transformer
    from moiety.train.lora import table

    place = find_checkpoint(base)
    model = load(place)
    if not isinstance(model, Transformer):
        raise UsageError(f"{base} is an encoder-decoder, which has no adapters here")
    if folder:
        from moiety.model.adapter_files import family_at, load_adapter

        load_adapter(model, folder, family=family_at(place))
        rows = table(model)
        if json:
            print_json(rows)
            return 0
        cells = [
            [row["group"], short(row["parameters"]), short(row["trained"]), f"{row['share']:.3%}"]
            for row in rows
        ]
        print_table(f"{folder} on {base}", ["part", "parameters", "added", "share"], cells)
        return 0
    found: dict[str, dict[str, int]] = {}
    for one in places(model):
        for part in one.parts:
            entry = found.setdefault(f"{one.group}.{part.name}", {"matrices": 0, "parameters": 0})
            entry["matrices"] += one.experts
            entry["parameters"] += one.experts * one.columns * (part.stop - part.start)
    if json:
        print_json([{"target": target, **entry} for target, entry in found.items()])
    else:
        cells = [
            [target, str(entry["matrices"]), short(entry["parameters"])] for target, entry in found.items()
        ]
        print_table(f"what can be adapted in {base}", ["target", "matrices", "parameters"], cells)
    return 0


def _check(base: str, folder: str, prompts: tuple[str, ...], *, json: bool) -> int:
    import torch

    from moiety.infer.open import open_model
    from moiety.model.adapter_files import family_at, read_adapter
    from moiety.train.adapter_check import check_adapter

    opened = open_model(base)
    read = read_adapter(opened.model, folder, family=family_at(opened.path))
    text = "\n".join(prompts or (PROMPT,))
    tokens = opened.tokenizer.encode_prompt(text)[: opened.model.config.max_positions]
    found = check_adapter(opened.model, read, torch.tensor([tokens]))
    if json:
        print_json(found.as_json())
    else:
        _print(found)
    if found.acts != "whole":
        idle = [f"{one.parameter}" + ("" if one.expert is None else f"[{one.expert}]") for one in found.idle]
        which = "" if found.acts == "nothing" or not idle else f": {', '.join(idle[:5])}"
        more = f" and {len(idle) - 5} more" if which and len(idle) > 5 else ""
        raise CheckFailed(
            f"{folder} does nothing to {base}"
            if found.acts == "nothing"
            else f"part of {folder} adds nothing{which}{more}",
            hint="B is zero there: it was not trained, or no token reached that expert",
        )
    return 0


def _print(found: Verdict) -> None:
    talk().print(
        f"largest change of a logit {found.moved:.4g}, KL {found.kl:.4g} nats/token, "
        f"same best token {found.agreement:.1%}"
        + (f"; brings {len(found.routers)} tensors of routers" if found.routers else "")
    )
    cells = [
        [
            one.parameter,
            "" if one.expert is None else str(one.expert),
            f"{one.norm:.4g}",
            f"{one.tokens:.1%}",
        ]
        for one in found.additions
    ]
    print_table(
        "what is added, and the share of the prompt's pairs", ["matrix", "expert", "norm", "tokens"], cells
    )


def _merge(base: str, folder: str, target: str, requantize: bool, *, json: bool) -> int:
    from moiety.infer.open import open_model
    from moiety.model import checkpoint
    from moiety.model.adapter_files import family_at, load_adapter
    from moiety.model.adapters import ACTIVE, merge

    if Path(target).resolve() in (Path(base).resolve(), Path(folder).resolve()):
        raise UsageError(f"{target} is to be written and is read", hint="name a new folder")
    opened = open_model(base)
    load_adapter(opened.model, folder, family=family_at(opened.path))
    done = merge(opened.model, ACTIVE, requantize=requantize)
    choice = checkpoint.save(opened.model, target, tokenizer=opened.tokenizer)
    result: dict[str, Any] = {
        "path": target,
        "written_as": choice.family.model_type,
        "lost": dict(done.errors),
    }
    if json:
        print_json(result)
        return 0
    print(f"{target}: {choice.family.model_type}, {len(done.modules)} layers merged")
    if done.errors:
        worst = max(done.errors, key=lambda one: done.errors[one])
        print(f"rounding took up to {done.errors[worst]:.1%} of what the adapter adds, most in {worst}")
    return 0

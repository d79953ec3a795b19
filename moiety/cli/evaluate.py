"""`moiety evaluate`: bits per byte of a trained model, also with other numbers of experts per token."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table, talk
from moiety.cli.own import import_own_routers
from moiety.errors import UsageError
from moiety.infer.options import RecordOptions

if TYPE_CHECKING:
    from moiety.train.evaluate import Evaluation

__all__ = ["app"]

app = command(
    "moiety evaluate", "Score held-out text with a trained model, for one or several numbers of experts."
)


@app.default
def evaluate(
    path: str,
    /,
    *sources: str,
    experts_per_token: Annotated[
        str, Parameter(help="numbers with commas between; none means the model's own")
    ] = "",
    batch: Annotated[int, Parameter(help="sequences at a time")] = 8,
    length: Annotated[int, Parameter(help="tokens in a sequence; 0 takes the model's longest")] = 0,
    sequences: Annotated[int, Parameter(help="most sequences of a domain")] = 64,
    bytes_per_domain: Annotated[int, Parameter(help="size of the default corpus")] = 1_000_000,
    record: Annotated[RecordOptions, Parameter(name="*")] = RecordOptions(),
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    json: Annotated[bool, Parameter(negative="", help="print the result as JSON")] = False,
) -> int:
    """Texts are named as for `moiety train`; none means the default corpus.

    Parameters
    ----------
    path
        A checkpoint folder, or a run folder, whose newest checkpoint is taken.
    """
    from moiety.infer.open import open_model, set_experts_per_token
    from moiety.infer.recording import recording
    from moiety.train.evaluate import evaluate as score
    from moiety.train.run import prepare_text

    import_own_routers(router)
    try:
        numbers = [int(word) for word in experts_per_token.split(",") if word.strip()]
    except ValueError:
        raise UsageError(
            f"experts_per_token is {experts_per_token!r}",
            hint="write numbers with commas, 1,2,4 for instance",
        ) from None
    opened = open_model(path)
    found: list[tuple[int | None, Evaluation]] = []
    with (
        tempfile.TemporaryDirectory(prefix="moiety-") as folder,
        recording(opened.model, record, name=path, source="moiety evaluate", say=talk().print) as recorder,
    ):
        text = prepare_text(
            Path(folder), sources, vocab_size=0, bytes_per_domain=bytes_per_domain, tokenizer=opened.tokenizer
        )
        for note in text.notes:
            talk().print(note, style="dim")
        wanted = length or opened.model.config.max_positions
        for number in (*numbers,) or (None,):
            if number is not None:
                set_experts_per_token(opened.model, number)
            how: dict[str, Any] = {"batch": batch, "length": wanted, "limit": sequences}
            found.append((number, score(opened.model, text.data, **how, recorder=recorder)))
    if json:
        print_json([_values(number, one) for number, one in found])
        return 0
    _print(found)
    return 0


def _print(found: Sequence[tuple[int | None, Evaluation]]) -> None:
    domains = list(found[0][1].bits_per_byte)
    rows = [
        [
            "own" if number is None else str(number),
            f"{one.mean_bits_per_byte:.3f}",
            *(f"{one.bits_per_byte[domain]:.3f}" for domain in domains),
            f"{sum(one.size_bytes.values()) / one.seconds:,.0f}",
        ]
        for number, one in found
    ]
    columns = ["experts/token", "mean", *domains, "bytes/s"]
    print_table("bits/byte of held-out text, lower is better", columns, rows)


def _values(number: int | None, one: Evaluation) -> dict[str, Any]:
    return {
        "experts_per_token": number,
        "mean_bits_per_byte": one.mean_bits_per_byte,
        "bits_per_byte": dict(one.bits_per_byte),
        "bytes_per_second": sum(one.size_bytes.values()) / one.seconds,
    }

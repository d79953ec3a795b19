"""`moiety quality`: what fewer bits cost a model's predictions, and its dense twin's."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table, talk
from moiety.infer.options import StreamOptions

if TYPE_CHECKING:
    from moiety.model.transformer import Transformer
    from moiety.train.data import Batch
    from moiety.train.quality import Quality

__all__ = ["app"]

app = command("moiety quality", "Compare a model in several formats with itself, on held-out text.")
FIGURES = ("perplexity", "bits_per_byte", "loss_in_bits_per_byte", "kl", "agreement")
OWN, STREAMED = "as it is", "streamed"


@app.default
def quality(
    path: str,
    /,
    *texts: str,
    formats: Annotated[
        str, Parameter(help="formats, int4-mixed, or part=format+part=format; commas between")
    ] = "int8-g32,int4-g32",
    against: Annotated[str, Parameter(help="a second model, such as the dense twin")] = "",
    batch: Annotated[int, Parameter(help="sequences at a time")] = 8,
    length: Annotated[
        int, Parameter(help="tokens in a sequence; 0 takes the model's longest, at most 512")
    ] = 0,
    sequences: Annotated[int, Parameter(help="most sequences of a domain")] = 32,
    stream: Annotated[StreamOptions, Parameter(name="*")] = StreamOptions(),
    json: Annotated[bool, Parameter(negative="", help="print the result as JSON")] = False,
) -> int:
    """Each figure comes with its 95 % confidence interval, whole sequences drawn again a thousand times.

    With --memory a packed model is compared with itself streamed, for what --resident-bias or --skip-misses-below cost.

    Parameters
    ----------
    path
        A checkpoint or run folder, a .gguf file, or owner/name on the hub.
    texts
        Named as for `moiety train`; none means the default corpus.
    """
    from moiety.infer.open import open_model
    from moiety.train.run import prepare_text

    rows: list[dict[str, Any]] = []
    chosen = [] if stream.memory else [one for one in formats.split(",") if one]
    for place in (path, *([against] if against else [])):
        streamed = open_model(place, stream=stream, say=talk().print).model if stream.memory else None
        opened = open_model(place)
        with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
            text = prepare_text(Path(folder), texts, vocab_size=0, tokenizer=opened.tokenizer)
            for note in text.notes:
                talk().print(note, style="dim")
            wanted = length or min(opened.model.config.max_positions, 512)
            batches = [
                piece
                for domain in text.data.domains
                for piece in text.data.evaluation(domain, B=batch, S=wanted, limit=sequences)
            ]
            rows += _rows(place, opened.model, chosen, batches, streamed)
    if json:
        print_json(rows)
        return 0
    _print(rows)
    return 0


def _print(rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            f"{row['model']}, {row['format']}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['perplexity']['value']:.3f}",
            f"{row['bits_per_byte']['value']:.4f}",
            *(_ranged(row[name], digits) for name, digits in (("loss_in_bits_per_byte", 4), ("kl", 5))),
            _ranged({end: 100 * share for end, share in row["agreement"].items()}, 1),
        ]
        for row in rows
    ]
    columns = [
        "model, format",
        "MB",
        "perplexity",
        "bits/byte",
        "bits/byte lost",
        "KL, nats/token",
        "same token, %",
    ]
    print_table("against the model as it is; in brackets 95 % intervals", columns, cells)


def _rows(
    place: str, model: Transformer, formats: list[str], batches: list[Batch], streamed: Transformer | None
) -> list[dict[str, Any]]:
    from moiety.infer.offload import store_of
    from moiety.quant.quantize import policy_named, quantize
    from moiety.train.quality import compare

    models = {OWN: model}
    for form in formats:
        models[form] = copy.deepcopy(model)
        quantize(models[form], policy_named(form))
    sizes = {name: sum(one.nbytes for one in made.state_dict().values()) for name, made in models.items()}
    if streamed is not None:
        models[STREAMED], sizes[STREAMED] = streamed, sizes[OWN]
    found: dict[str, Quality] = compare(model, models, batches)
    store = None if streamed is None else store_of(streamed)
    if store is not None:
        talk().print(store.statistics().words)
    return [
        {"model": place, "format": name, "bytes": sizes[name]}
        | {figure: getattr(one, figure)._asdict() for figure in FIGURES}
        for name, one in found.items()
    ]


def _ranged(one: dict[str, float], digits: int) -> str:
    return f"{one['value']:.{digits}f} [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"

"""A model beside changed copies of itself on held-out text: the rows and tables of `moiety eval --ppl`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from moiety.cli.output import print_table, talk
from moiety.errors import UsageError
from moiety.infer.offload import store_of
from moiety.infer.open import open_model, set_experts_per_token
from moiety.infer.options import RecordOptions, StreamOptions
from moiety.infer.recording import recording
from moiety.model.adapters import activate
from moiety.model.transformer import Transformer
from moiety.quant.quantize import policy_named, quantize
from moiety.train.options import HeldOutOptions
from moiety.train.quality import compare, row
from moiety.train.run import held_out

__all__ = ["print_rows", "rows_of"]

OWN, STREAMED, WITHOUT = "as it is", "streamed", "without adapter"


def rows_of(
    place: str,
    sources: Sequence[str],
    options: HeldOutOptions,
    formats: Sequence[str],
    experts: Sequence[str],
    stream: StreamOptions,
    record: RecordOptions,
    adapter: str = "",
) -> list[dict[str, Any]]:
    """A row for a model as it is, one for each format, one for each number of experts per token, and one streamed.

    Raises:
        UsageError: there is no such model, a number is none, or what is to be streamed or recorded cannot be.
        BudgetError: the model cannot be streamed within so little memory.
        ConfigError: there is no such format, or the model cannot use so many experts.
        DataError: a text cannot be read or is too little.
    """
    streamed = open_model(place, stream=stream, say=talk().print).model if stream.memory else None
    if adapter and formats:
        raise UsageError(
            "a model with an adapter is not packed", hint="pack the model first: moiety quantize"
        )
    opened = open_model(place, adapters=[adapter] if adapter else [])
    models = _variants(opened.model, formats, experts)
    if adapter:
        shared = {id(part): part for part in (*opened.model.parameters(), *opened.model.buffers())}
        models[WITHOUT] = copy.deepcopy(opened.model, shared)
        activate(models[WITHOUT], "")
    sizes = {name: sum(one.nbytes for one in made.state_dict().values()) for name, made in models.items()}
    if streamed is not None:
        models[STREAMED], sizes[STREAMED] = streamed, sizes[OWN]
    batches, notes = held_out(sources, opened.tokenizer, opened.model.config.max_positions, options)
    for note in notes:
        talk().print(note, style="dim")
    kept = recording(
        opened.model, record, name=place, source="moiety eval", domains=list(batches), say=talk().print
    )
    with kept as recorder:
        by_domain = {
            domain: compare(opened.model, models, pieces, recorder, domain=number)
            for number, (domain, pieces) in enumerate(batches.items())
        }
    store = None if streamed is None else store_of(streamed)
    if store is not None:
        talk().print(store.statistics().words)
    return [
        row(place, name, size, {domain: found[name] for domain, found in by_domain.items()})
        for name, size in sizes.items()
    ]


def _variants(model: Transformer, formats: Sequence[str], experts: Sequence[str]) -> dict[str, Transformer]:
    """The model and its changed copies; what is not changed is shared, not copied."""
    shared = {id(part): part for part in (*model.parameters(), *model.buffers())}
    models = {OWN: model}
    for form in formats:
        models[form] = copy.deepcopy(model, dict(shared))
        quantize(models[form], policy_named(form))
    for number in experts:
        if not (number.isascii() and number.isdigit()):
            raise UsageError(
                f"experts_per_token has {number!r}", hint="write numbers with commas, 1,2,4 for instance"
            )
        name = f"{number} experts/token"
        models[name] = copy.deepcopy(model, dict(shared))
        set_experts_per_token(models[name], int(number))
    return models


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Two tables: all texts together, and by domain."""
    several = len({row["model"] for row in rows}) > 1
    compared = (("loss_in_bits_per_byte", 4, 1), ("kl", 5, 1), ("agreement", 1, 100))
    cells = [
        [
            _label(row, several),
            f"{row['bytes'] / 1e6:.1f}",
            _ranged(row["perplexity"], 3),
            _ranged(row["bits_per_byte"], 4),
            *(_ranged(row[name], digits, factor) for name, digits, factor in compared if len(rows) > 1),
        ]
        for row in rows
    ]
    columns = ["model", "MB", "perplexity", "bits/byte"]
    columns += ["bits/byte lost", "KL, nats/token", "same token, %"] if len(rows) > 1 else []
    print_table("held-out text; in brackets 95 % intervals; lost against the model as it is", columns, cells)
    domains = list(rows[0]["domains"])
    cells = [
        [
            _label(row, several),
            f"{row['mean_bits_per_byte']:.3f}",
            *(f"{row['domains'][domain]:.3f}" for domain in domains),
        ]
        for row in rows
    ]
    print_table("bits/byte by domain, and the mean of domains", ["model", "mean", *domains], cells)


def _label(row: Mapping[str, Any], several: bool) -> str:
    return f"{row['model']}, {row['variant']}" if several else str(row["variant"])


def _ranged(one: Mapping[str, float], digits: int, factor: float = 1) -> str:
    value, low, high = (f"{factor * one[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"

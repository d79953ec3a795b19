"""`moiety bench`: how fast a model is on this machine, and what share of the machine's limits that is."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table, talk
from moiety.errors import UsageError
from moiety.infer.options import BenchOptions, RecordOptions, StreamOptions

__all__ = ["app"]

app = command("moiety bench", "Measure prompts and decoding against this machine's limits.")
# Of a column: its heading, its figure, what that is multiplied by, how it is written.
Columns = Sequence[tuple[str, str, float, str]]
PREFILL: Columns = (
    ("prompt", "tokens", 1, "{:.0f} tokens"),
    ("tokens/s", "tokens_per_s", 1, "{:.1f}"),
    ("first token, ms", "first_token_s", 1e3, "{:.1f}"),
    ("Gop/s", "operations_per_s", 1e-9, "{:.1f}"),
    ("multiply rate", "multiply_share", 100, "{:.0f} %"),
)
BATCH = ("batch", "sequences", 1, "{:.0f} at once")
DECODING: Columns = (
    BATCH,
    ("tokens/s", "tokens_per_s", 1, "{:.1f}"),
    ("token p50, ms", "latency_p50_s", 1e3, "{:.1f}"),
    ("p99, ms", "latency_p99_s", 1e3, "{:.1f}"),
    ("first token, ms", "first_token_s", 1e3, "{:.1f}"),
)
READING: Columns = (
    BATCH,
    ("imbalance", "imbalance", 1, "{:.2f}"),
    ("experts", "distinct_experts", 1, "{:.1f}"),
    ("MB", "step_bytes", 1e-6, "{:.1f}"),
    ("read rate", "read_share", 100, "{:.0f} %"),
)


@app.default
def bench(
    path: str = "",
    /,
    *,
    shape: Annotated[str, Parameter(help="a name of `moiety models`: random weights, no path")] = "",
    layers: Annotated[int, Parameter(help="of the shape; 0 takes all")] = 0,
    format: Annotated[str, Parameter(help="of the shape's weights, as for `moiety quantize`")] = "int4-g32",
    measured: Annotated[BenchOptions, Parameter(name="*")] = BenchOptions(),
    stream: Annotated[StreamOptions, Parameter(name="*")] = StreamOptions(),
    record: Annotated[RecordOptions, Parameter(name="*")] = RecordOptions(),
    keep_blocks: Annotated[bool, Parameter(help="multiply Q4_0, Q8_0, mxfp4 ... blocks as stored")] = True,
    json: Annotated[bool, Parameter(negative="", help="print JSON")] = False,
) -> int:
    """Prompts are random tokens. `docs/engine.md` says what each figure is.

    Parameters
    ----------
    path
        A checkpoint or run folder, a .gguf file, or owner/name on the hub.
    """
    from moiety.infer import measure, offload, open, recording
    from moiety.quant import pretend

    if bool(path) == bool(shape):
        hint = "moiety bench --shape olmoe-1b-7b --layers 4"
        raise UsageError("one of a path and --shape is wanted", hint=hint)
    if shape and stream.memory:
        raise UsageError("a shape's weights are in no file to stream", hint="give a packed model's folder")
    if shape:
        model = pretend.packed_model(pretend.shape_named(shape, layers), format)
    else:
        model = measure.model_at(open.find_checkpoint(path), measured, stream, keep_blocks, talk().print)
    with recording.recording(
        model, record, name=path or shape, source="moiety bench", say=talk().print
    ) as recorder:
        found = measure.run(model, measured, talk().print, recorder)
    store = offload.store_of(model)
    if store is not None:
        talk().print(store.statistics().words)
    if json:
        rows = {name: [asdict(one) for one in getattr(found, name)] for name in ("prefill", "decode")}
        print_json({"model": path or shape, **rows, "knee": found.knee and found.knee._asdict()})
        return 0
    for title, columns, figures in (
        ("prompts", PREFILL, found.prefill),
        ("decoding", DECODING, found.decode),
        ("what a step reads", READING, found.decode),
    ):
        cells = [[_cell(getattr(row, name), by, how) for _, name, by, how in columns] for row in figures]
        if cells:
            print_table(title, [heading for heading, *_ in columns], cells)
    if found.knee is not None:
        print(textwrap.fill(found.knee.words, shutil.get_terminal_size().columns))
    return 0


def _cell(value: float | None, by: float, how: str) -> str:
    return "unknown" if value is None else how.format(value * by)

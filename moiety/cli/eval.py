"""`moiety eval`: how well a model predicts text, or how it does at public tasks."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table, talk
from moiety.cli.own import import_own_routers
from moiety.errors import UsageError
from moiety.infer.options import EngineOptions, RecordOptions, StreamOptions, TaskOptions
from moiety.packages import need
from moiety.train.options import HeldOutOptions

__all__ = ["app"]

app = command("moiety eval", "Score a model on held-out text (--ppl) or on public tasks (--tasks).")


@app.default
def evaluate(
    path: str,
    /,
    *texts: str,
    ppl: Annotated[
        bool, Parameter(negative="", help="perplexity of texts, named as for `moiety train`")
    ] = False,
    tasks: Annotated[str, Parameter(help="tasks of lm-evaluation-harness; commas between")] = "",
    formats: Annotated[
        str,
        Parameter(
            help="--ppl: also packed in formats, int4-mixed, or part=format+part=format; commas between"
        ),
    ] = "",
    experts_per_token: Annotated[
        str, Parameter(help="--ppl: also with so many experts for each token; commas between")
    ] = "",
    against: Annotated[str, Parameter(help="--ppl: also a second model, such as the dense twin")] = "",
    text: Annotated[HeldOutOptions, Parameter(name="*")] = HeldOutOptions(),
    task: Annotated[TaskOptions, Parameter(name="*")] = TaskOptions(),
    engine: Annotated[EngineOptions, Parameter(name="*")] = EngineOptions(),
    stream: Annotated[StreamOptions, Parameter(name="*")] = StreamOptions(),
    record: Annotated[RecordOptions, Parameter(name="*")] = RecordOptions(),
    adapter: Annotated[str, Parameter(help="folder of an adapter to put on the model")] = "",
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    json: Annotated[bool, Parameter(negative="", help="print the result as JSON")] = False,
) -> int:
    """With --ppl the model stands beside changed copies of itself, each figure with its 95 % confidence interval.

    With --memory it is streamed; --ppl sets that beside the model as it is. --record is of PATH as it is, with --ppl.

    Parameters
    ----------
    path
        A checkpoint or run folder, a .gguf file, or owner/name on the hub.
    texts
        For --ppl; none means the default corpus.
    """
    compared = bool(
        formats or experts_per_token or against or texts or record.record or text != HeldOutOptions()
    )
    if ppl == bool(tasks) or (compared if tasks else (task, engine) != (TaskOptions(), EngineOptions())):
        raise UsageError(
            "one of --ppl and --tasks is wanted, each with its own options",
            hint="moiety eval MODEL --ppl --formats int8-g32,int4-g32, or moiety eval MODEL --tasks mmlu --limit 100",
        )
    import_own_routers(router)
    if tasks:
        return _tasks(path, _words(tasks), task, engine, stream, adapter, json=json)
    from moiety.cli.perplexity import print_rows, rows_of

    rows, kept, mine = [], record, adapter
    for place in (path, *_words(against)):
        rows += rows_of(place, texts, text, _words(formats), _words(experts_per_token), stream, kept, mine)
        kept, mine = RecordOptions(), ""
    if json:
        print_json(rows)
    else:
        print_rows(rows)
    return 0


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _tasks(
    path: str,
    names: list[str],
    task: TaskOptions,
    engine: EngineOptions,
    stream: StreamOptions,
    adapter: str,
    *,
    json: bool,
) -> int:
    need("moiety.infer.harness", "--tasks", "moiety[eval]")
    from moiety.infer.harness import figures_of, run_tasks
    from moiety.infer.offload import store_of
    from moiety.infer.open import open_model

    adapters = [adapter] if adapter else []
    opened = open_model(path, stream=stream, engine=engine, say=talk().print, adapters=adapters)
    found = run_tasks(opened, names, task, engine, talk().print)
    store = store_of(opened.model)
    if store is not None:
        talk().print(store.statistics().words)
    rows = figures_of(found)
    if json:
        print_json(
            {
                "model": path,
                "lm_eval": found["lm_eval_version"],
                "figures": [row._asdict() for row in rows],
            }
        )
        return 0
    cells = [
        [
            f"{row.task}, {row.metric}" + ("" if row.filter == "none" else f" ({row.filter})"),
            "none" if row.value is None else f"{row.value:.4f}",
            "" if row.stderr is None else f"{row.stderr:.4f}",
            "" if row.examples is None else f"{row.examples:,}",
            str(row.fewshot),
        ]
        for row in rows
    ]
    title = f"lm-evaluation-harness {found['lm_eval_version']}"
    print_table(title, ["task, metric", "value", "standard error", "examples", "shots"], cells)
    return 0

"""`moiety compare`: an MoE against its dense twin, or one router against others, over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from moiety.cli.output import command, interruptible, print_json, print_table, talk
from moiety.cli.own import import_own_routers
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions

if TYPE_CHECKING:
    from moiety.train.compare import Contender, Spread

__all__ = ["app"]

app = command(
    "moiety compare",
    "Train an MoE and its dense twin, or the same MoE with several routers, and tabulate over seeds.",
)

ROUTING = {
    "max_vio": "MaxVio",
    "dead": "dead",
    "dropped": "dropped",
    "experts_per_token": "experts/token",
    "tokens_per_second": "tok/s",
}


@app.default
def compare(
    *sources: str,
    out: Annotated[Path, Parameter(help="folder for the tokens that are kept")] = Path("runs/compare"),
    routers: Annotated[str, Parameter(help="names with commas between; `moiety routers` lists them")] = "",
    seeds: Annotated[int, Parameter(help="how many seeds, from --seed on")] = 3,
    dense_learning_rate: Annotated[float, Parameter(help="the twin's own rate; 0 takes the MoE's")] = 0.0,
    vocab_size: Annotated[int, Parameter(help="entries of the tokenizer that is learnt")] = 2048,
    bytes_per_domain: Annotated[int, Parameter(help="size of the default corpus")] = 1_000_000,
    model: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
    options: Annotated[TrainOptions, Parameter(name="*")] = TrainOptions(),
    json: Annotated[bool, Parameter(negative="", help="print the result as JSON")] = False,
) -> int:
    """All see the same tokens in the same order; texts are named as for `moiety train`."""
    from moiety.cli.progress import TrainingDisplay
    from moiety.observe.plots import write_learning_curves
    from moiety.train.compare import over_seeds, race, seeded_pairs, seeded_routers
    from moiety.train.host import host_line, keep_freed_memory
    from moiety.train.run import prepare_text

    console = talk()
    keep_freed_memory()
    names = [name.strip() for name in routers.split(",") if name.strip()]
    import_own_routers(*names, model.router)
    text = prepare_text(out, sources, vocab_size=vocab_size, bytes_per_domain=bytes_per_domain)
    for note in text.notes:
        console.print(note, style="dim")
    vocabulary, rate = text.tokenizer.vocab_size, dense_learning_rate or None
    races: Sequence[Sequence[Contender]]
    if names:
        races = seeded_routers(model, options, names, seeds=seeds, vocab_size=vocabulary)
    else:
        races = seeded_pairs(model, options, seeds=seeds, vocab_size=vocabulary, dense_learning_rate=rate)
    finished = []
    with interruptible(console, "what is finished is tabulated") as stop:
        for contenders in races:
            with TrainingDisplay(contenders, console) as display:
                for contender, record in race(contenders, text.data, stop=stop):
                    display.show(contender, record)
            if stop.is_set():
                break
            for contender in contenders:
                contender.model = None  # its figures are kept, its weights are not
            finished.append(contenders)
    if not finished:
        console.print("stopped before the first seed was finished; nothing to tabulate")
        return 1
    figures = over_seeds(finished)
    if json:
        spreads = {name: {key: one.values for key, one in all_of.items()} for name, all_of in figures.items()}
        print_json({"host": host_line(), "seeds": len(finished), "figures": spreads})
    elif names:
        _print_routers(figures, len(finished))
    else:
        _print_twins(figures, len(finished))
    if not json:
        print(host_line())
    page = out / ("routers.html" if names else "twins.html")
    write_learning_curves(page, f"{' · '.join(figures)}, {len(finished)} seeds", finished)
    console.print(f"curves: {page}")
    return 0


def _print_twins(figures: Mapping[str, Mapping[str, Spread]], seeds: int) -> None:
    rows = [[name, str(figures["moe"][name]), str(figures["dense"][name])] for name in figures["dense"]]
    print_table(f"bits/byte over {seeds} seeds, mean ± standard deviation", ["", "MoE", "dense twin"], rows)


def _print_routers(figures: Mapping[str, Mapping[str, Spread]], seeds: int) -> None:
    rows = [[name, str(one["mean"]), *(str(one[key]) for key in ROUTING)] for name, one in figures.items()]
    title = f"{seeds} seeds, mean ± standard deviation; bits/byte of held-out text, mean of domains"
    print_table(title, ["router", "bits/byte", *ROUTING.values()], rows)

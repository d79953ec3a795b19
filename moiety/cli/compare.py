"""`moiety compare`: an MoE and its dense twin over several seeds, as a table with spreads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moiety.cli.output import command, interruptible, print_json, print_table, talk
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions

__all__ = ["app"]

app = command(
    "moiety compare",
    "Train an MoE and its dense twin with several seeds, and tabulate.",
)


@app.default
def compare(
    *sources: str,
    out: Annotated[Path, Parameter(help="folder for the tokens that are kept")] = Path("runs/compare"),
    seeds: Annotated[int, Parameter(help="how many seeds, from --seed on")] = 3,
    dense_learning_rate: Annotated[float, Parameter(help="the twin's own rate; 0 takes the MoE's")] = 0.0,
    vocab_size: Annotated[int, Parameter(help="entries of the tokenizer that is learnt")] = 2048,
    bytes_per_domain: Annotated[int, Parameter(help="size of the default corpus")] = 1_000_000,
    model: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
    options: Annotated[TrainOptions, Parameter(name="*")] = TrainOptions(),
    json: Annotated[bool, Parameter(negative="", help="print the result as JSON")] = False,
) -> int:
    """Both see the same tokens in the same order; texts are named as for `moiety train`."""
    from moiety.cli.progress import TrainingDisplay
    from moiety.train.compare import over_seeds, race, seeded_pairs
    from moiety.train.host import host_line, keep_freed_memory
    from moiety.train.run import prepare_text

    console = talk()
    keep_freed_memory()
    text = prepare_text(out, sources, vocab_size=vocab_size, bytes_per_domain=bytes_per_domain)
    for note in text.notes:
        console.print(note, style="dim")
    pairs = seeded_pairs(
        model,
        options,
        seeds=seeds,
        vocab_size=text.tokenizer.vocab_size,
        dense_learning_rate=dense_learning_rate or None,
    )
    finished = []
    with interruptible(console, "what is finished is tabulated") as stop:
        for pair in pairs:
            with TrainingDisplay(pair, console) as display:
                for contender, record in race(pair, text.data, stop=stop):
                    display.show(contender, record)
            if stop.is_set():
                break
            for contender in pair:
                contender.model = None  # its figures are kept, its weights are not
            finished.append(pair)
    if not finished:
        console.print("stopped before the first seed was finished; nothing to tabulate")
        return 1
    figures = over_seeds(finished)
    if json:
        spreads = {name: {key: one.values for key, one in all_of.items()} for name, all_of in figures.items()}
        print_json({"host": host_line(), "seeds": len(finished), "figures": spreads})
        return 0
    rows = [[name, str(figures["moe"][name]), str(figures["dense"][name])] for name in figures["moe"]]
    print_table(
        f"bits/byte over {len(finished)} seeds, mean ± standard deviation", ["", "MoE", "dense twin"], rows
    )
    print(host_line())
    return 0

"""Results of papers, again, in ratio and at the size of a small machine: `python recipes/literature.py collapse`.

Each function is one experiment: a question, the arms that answer it, and what the paper saw. All arms of a seed
train in turn on the same tokens in the same order, with the model and learning rate of `SMALL`. The last line on
stdout is JSON; LOG.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moiety import cost
from moiety.errors import MoietyError
from moiety.model.transformer import Transformer
from moiety.observe.stats import specialization_of_sequences
from moiety.train.compare import Contender, Spread, race, routing_figures
from moiety.train.data import TokenData
from moiety.train.host import host_line, keep_freed_memory
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions
from moiety.train.run import prepare_text

__all__ = ["EXPERIMENTS", "main"]

MODEL = ModelOptions(d_model=96, layers=3, heads=2, d_ff=96, experts=16, experts_per_token=2)
SMALL = TrainOptions(
    steps=400,
    batch=8,
    length=128,
    learning_rate=2.8e-3,
    warmup=50,
    evaluate_every=50,
    evaluate_sequences=16,
)


@dataclass(frozen=True)
class Arm:
    """One way to do it. `dense` trains the dense twin of the model instead."""

    name: str
    model: ModelOptions = MODEL
    options: TrainOptions = SMALL
    dense: bool = False


@dataclass(frozen=True)
class Experiment:
    """A question, what a paper answered, the arms that answer it here, and further figures to take of each."""

    question: str
    source: str
    arms: tuple[Arm, ...]
    further: Callable[[Contender, TokenData], dict[str, float]] | None = None


def collapse() -> Experiment:
    """No balance loss against any (arXiv 1701.06538, table 6: 39.8 perplexity without, 35.6 to 35.7 with any)."""
    bare = replace(MODEL, balance_loss=0.0, z_loss=0.0)
    noisy = replace(bare, router="noisy")
    return Experiment(
        question="does a router collapse without a balance loss, and does it matter which one there is?",
        source="arXiv 1701.06538 table 6",
        arms=(
            Arm("nothing", bare),
            Arm("noise only", noisy),
            Arm("load 0.01", replace(bare, balance_loss=0.01)),
            Arm("load 0.1", replace(bare, balance_loss=0.1)),
            Arm("importance 0.1", bare, replace(SMALL, losses=("importance=0.1",))),
            Arm("importance + load 0.1", noisy, replace(SMALL, losses=("importance=0.1", "smooth_load=0.1"))),
        ),
    )


def loss_free() -> Experiment:
    """A bias against a loss (arXiv 2408.15664, table 2: perplexity 9.56 and MaxVio 0.72 against 9.50 and 0.04)."""
    loss = replace(MODEL, router="sigmoid", z_loss=0.0, balance_loss=0.001)
    free = replace(loss, balance_loss=0.0, selection_bias=True)
    return Experiment(
        question="does a selection bias balance better than an auxiliary loss, at no cost in loss?",
        source="arXiv 2408.15664 table 2",
        arms=(
            Arm("auxiliary loss 0.001", loss),
            Arm("auxiliary loss 0.01", replace(loss, balance_loss=0.01)),
            Arm("bias 0.001", free),
            Arm("bias 0.01", replace(free, bias_rate=0.01)),
            Arm("bias 0.01, proportional", replace(free, bias_rate=0.01, bias_rule="proportional")),
            Arm("bias at the quantile", replace(free, bias_rule="quantile")),
        ),
    )


def global_batch() -> Experiment:
    """What the balance is counted over (arXiv 2501.11873, table 1: perplexity 8.17 over 4 sequences, 8.04 over 512)."""
    cut = replace(SMALL, batch=1, accumulate=8)
    return Experiment(
        question="does balance over a whole step leave more room to specialise than over each micro-batch?",
        source="arXiv 2501.11873 table 1",
        arms=tuple(
            Arm(scope, replace(MODEL, balance_loss=0.1), replace(cut, balance_scope=scope))
            for scope in ("sequence", "micro_batch", "step")
        )[1:],
        further=specialisation,
    )


def fine_grained() -> Experiment:
    """Many small experts and a shared one (arXiv 2401.06066, table 1: GShard 1.867, DeepSeekMoE 1.808; dense 2.060)."""
    few = replace(MODEL, experts=4, experts_per_token=1, d_ff=192, renormalize=False)
    return Experiment(
        question="at equal active and total size, do many small experts beat few large ones? does a shared one help?",
        source="arXiv 2401.06066 table 1; OLMoE (2409.02060) finds the shared one slightly worse",
        arms=(
            Arm("dense twin", few, dense=True),
            Arm("hash, 1 of 4", replace(few, router="hash")),
            Arm("1 of 4", few),
            Arm("4 of 16", replace(few, experts=16, experts_per_token=4, d_ff=48)),
            Arm(
                "3 of 15 + 1 shared",
                replace(few, experts=15, experts_per_token=3, d_ff=48, shared_d_ff=48),
            ),
        ),
    )


def capacity() -> Experiment:
    """Dropless against capacity, and what expert choice gains by reading ahead (arXiv 2408.15664 section 4.2)."""
    tight = replace(MODEL, capacity_factor=1.0)
    return Experiment(
        question="what do dropped tokens cost, and how many bits does expert choice take from the future?",
        source="arXiv 2101.03961 table 1, 2409.02060, 2408.15664 section 4.2",
        arms=(
            Arm("dropless"),
            Arm("capacity 1.25", replace(tight, capacity_factor=1.25)),
            Arm("capacity 1.0", tight),
            Arm("capacity 1.0, priority", replace(tight, overflow="priority")),
            Arm("capacity 1.0, reroute", replace(tight, overflow="reroute")),
            Arm("expert choice", replace(MODEL, router="expert_choice", balance_loss=0.0)),
        ),
        further=reading_ahead,
    )


def speed_up() -> Experiment:
    """Steps to the dense twin's loss (arXiv 2101.03961: 1/7 of them with 64 experts; OLMoE 2409.02060: a third)."""
    one = replace(MODEL, experts_per_token=1, d_ff=192, router="switch")
    long = replace(SMALL, steps=800)
    return Experiment(
        question="in how many steps does an MoE reach the last loss of its dense twin?",
        source="arXiv 2101.03961 figure 5, 2409.02060 figure 4",
        arms=(
            Arm("dense twin", one, long, dense=True),
            Arm("1 of 4", replace(one, experts=4), long),
            Arm("1 of 16", one, long),
            Arm("2 of 32, half as wide", replace(MODEL, experts=32), long),
        ),
    )


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "collapse": collapse,
    "loss-free": loss_free,
    "global-batch": global_batch,
    "fine-grained": fine_grained,
    "capacity": capacity,
    "speed-up": speed_up,
}


def specialisation(contender: Contender, data: TokenData) -> dict[str, float]:
    """How far domains are routed apart, over what chance gives."""
    found = contender.evaluation
    if found.counts_SLE is None:
        return {}
    seen = specialization_of_sequences(found.counts_SLE, found.domain_S, data.domains)
    return {"specialisation": seen.score, "specialisation by chance": seen.chance.overall}


@torch.no_grad()
def reading_ahead(
    contender: Contender, data: TokenData, sequences: int = 12, length: int = 48
) -> dict[str, float]:
    """Bits per token that are lost when a token may not look at later ones: whole text against prefix by prefix."""
    model = contender.build().eval()
    ahead, honest, tokens = 0.0, 0.0, 0
    for domain in data.domains:
        for batch in data.evaluation(domain, B=1, S=length, limit=max(sequences // len(data.domains), 1)):
            tokens_BS, targets_BS = batch.tokens_BS, batch.targets_BS
            ahead += nats(model, tokens_BS, targets_BS)
            for stop in range(1, tokens_BS.shape[1] + 1):
                targets = torch.full_like(targets_BS[:, :stop], -100)
                targets[:, -1] = targets_BS[:, stop - 1]
                honest += nats(model, tokens_BS[:, :stop], targets)
            tokens += int((targets_BS != -100).sum())
    return {"bits gained by reading ahead": (honest - ahead) / tokens / 0.6931471805599453}


def nats(model: Transformer, tokens_BS: torch.Tensor, targets_BS: torch.Tensor) -> float:
    """Summed cross entropy of one batch."""
    output = model(tokens_BS)
    return output.cross_entropy(targets_BS).item()


def contenders(arms: Sequence[Arm], seed: int, vocab_size: int) -> list[Contender]:
    """The arms of one seed."""
    made = []
    for arm in arms:
        config = arm.model.config(vocab_size, arm.options.length)
        config = cost.dense_twin(config) if arm.dense else config
        made.append(Contender(name=arm.name, config=config, options=replace(arm.options, seed=seed)))
    return made


def steps_to(contender: Contender, bits: float) -> float | None:
    """Step at which held-out bits per byte first reach `bits`, on a line between evaluations; None if never."""
    before: tuple[int, float] | None = None
    for record in contender.records:
        if record.evaluation is None:
            continue
        now = record.evaluation.mean_bits_per_byte
        if now <= bits:
            if before is None or before[1] == now:
                return float(record.state.step)
            share = (before[1] - bits) / (before[1] - now)
            return before[0] + share * (record.state.step - before[0])
        before = (record.state.step, now)
    return None


def run(name: str, seeds: int, steps: int, out: Path) -> dict[str, Any]:
    """One experiment over several seeds: every figure of every arm, as a list over seeds."""
    experiment = EXPERIMENTS[name]()
    text = prepare_text(out, (), vocab_size=1024)
    figures: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in experiment.arms}
    for seed in range(seeds):
        arms = [
            replace(arm, options=replace(arm.options, steps=steps or arm.options.steps))
            for arm in experiment.arms
        ]
        racing = contenders(arms, seed, text.tokenizer.vocab_size)
        for contender, record in race(racing, text.data):
            if record.state.step == contender.options.steps:
                bits = contender.evaluation.mean_bits_per_byte
                print(f"{name}, seed {seed}: {contender.name} {bits:.4f} bits/byte", file=sys.stderr)
        first = racing[0].evaluation.mean_bits_per_byte
        for contender in racing:
            taken = {
                "bits/byte": contender.evaluation.mean_bits_per_byte,
                **routing_figures(contender),
                **(experiment.further(contender, text.data) if experiment.further else {}),
            }
            reached = steps_to(contender, first)
            if reached is not None:
                taken[f"steps to {racing[0].name}"] = reached
            for key, value in taken.items():
                figures[contender.name].setdefault(key, []).append(value)
    return {"experiment": name, "question": experiment.question, "source": experiment.source, "arms": figures}


def table(result: dict[str, Any]) -> str:
    """The figures as a table in plain text, mean ± standard deviation."""
    keys = list(dict.fromkeys(key for one in result["arms"].values() for key in one))
    rows = [["", *keys]]
    for name, one in result["arms"].items():
        rows.append([name, *(str(Spread.of(one[key])) if key in one else "" for key in keys)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(keys) + 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def main() -> int:
    """Run the named experiments, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; none means all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="of each run; 0 leaves each experiment its own")
    parser.add_argument("--out", type=Path, default=Path("runs/literature"), help="folder for the tokens")
    chosen = parser.parse_args()
    unknown = [name for name in chosen.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    keep_freed_memory()
    results = []
    try:
        for name in chosen.experiments or EXPERIMENTS:
            results.append(run(name, chosen.seeds, chosen.steps, chosen.out))
            print(
                f"\n{results[-1]['question']} ({results[-1]['source']})\n{table(results[-1])}",
                file=sys.stderr,
            )
    except MoietyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"host": host_line(), "seeds": chosen.seeds, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

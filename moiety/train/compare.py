"""Several models on the same text, in the same order, step by step side by side."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moiety import cost
from moiety.config import ModelConfig, require
from moiety.errors import ConfigError
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.train.data import TokenData
from moiety.train.evaluate import Evaluation
from moiety.train.loop import StepRecord, Stop, train
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions

__all__ = [
    "Contender",
    "Spread",
    "over_seeds",
    "pair",
    "race",
    "routing_figures",
    "seeded_pairs",
    "seeded_routers",
]


@dataclass(kw_only=True, eq=False)
class Contender:
    """One model in a race, and what it has done so far.

    Args:
        name: Shown in tables.
        config: The model.
        options: How it is trained.
        model: Built from `config` with the options' seed when not given.
        records: One per step, filled by `race`.
    """

    name: str
    config: ModelConfig
    options: TrainOptions
    model: Transformer | None = None
    records: list[StepRecord] = field(default_factory=list)

    def build(self) -> Transformer:
        """The model, made on first use from the options' seed."""
        if self.model is None:
            torch.manual_seed(self.options.seed)
            self.model = Transformer(self.config)
        return self.model

    @property
    def parameters(self) -> cost.Parameters:
        """Exact counts."""
        return cost.parameters(self.config)

    @property
    def evaluation(self) -> Evaluation:
        """The last one."""
        done = [record.evaluation for record in self.records if record.evaluation is not None]
        assert done, f"{self.name} was never evaluated"
        return done[-1]

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens over training time, the first tenth of the steps left out as warm-up."""
        records = self.records[len(self.records) // 10 :]
        return sum(record.tokens for record in records) / sum(record.step_seconds for record in records)


def race(
    contenders: Sequence[Contender],
    data: TokenData,
    *,
    run_folder: Path | None = None,
    tokenizer: Tokenizer | None = None,
    stop: Stop | None = None,
) -> Iterator[tuple[Contender, StepRecord]]:
    """Train all contenders, one step of each in turn, so that noise of the machine falls on all alike.

    Args:
        contenders: Each is filled with its records. The same seed gives the same data order.
        data: What all are trained and evaluated on.
        run_folder: Each contender's checkpoints go to a folder of its name in here.
        tokenizer: Saved beside the weights.
        stop: When set, all save and end.

    Yields:
        (contender, record) after every step of any of them.
    """
    runs = [
        train(
            contender.build(),
            data,
            contender.options,
            run_folder=None if run_folder is None else run_folder / contender.name,
            tokenizer=tokenizer,
            stop=stop,
        )
        for contender in contenders
    ]
    for records in itertools.zip_longest(*runs):
        for contender, record in zip(contenders, records, strict=True):
            if record is not None:
                contender.records.append(record)
                yield contender, record


def pair(
    model: ModelOptions,
    options: TrainOptions,
    *,
    vocab_size: int,
    dense_learning_rate: float | None = None,
) -> tuple[Contender, Contender]:
    """An MoE and its dense twin of equal active parameters, to be trained on the same tokens.

    Args:
        model: The MoE.
        options: How both are trained.
        vocab_size: Of the tokenizer.
        dense_learning_rate: The twin's own best rate; None takes the MoE's.

    Raises:
        ConfigError: `model` is dense already.
    """
    config = model.config(vocab_size, options.length)
    if config.moe is None:
        raise ConfigError("a dense model has no dense twin", hint="set experts to 2 or more")
    rate = options.learning_rate if dense_learning_rate is None else dense_learning_rate
    return (
        Contender(name="moe", config=config, options=options),
        Contender(name="dense", config=cost.dense_twin(config), options=replace(options, learning_rate=rate)),
    )


def seeded_pairs(
    model: ModelOptions,
    options: TrainOptions,
    *,
    seeds: int,
    vocab_size: int,
    dense_learning_rate: float | None = None,
) -> list[tuple[Contender, Contender]]:
    """One `pair` for each of `seeds` seeds, from the options' own on.

    Raises:
        ConfigError: `model` is dense already, or `seeds` is not positive.
    """
    require(seeds > 0, f"seeds is {seeds}; it must be positive")
    return [
        pair(
            model,
            replace(options, seed=options.seed + number),
            vocab_size=vocab_size,
            dense_learning_rate=dense_learning_rate,
        )
        for number in range(seeds)
    ]


def seeded_routers(
    model: ModelOptions, options: TrainOptions, routers: Sequence[str], *, seeds: int, vocab_size: int
) -> list[list[Contender]]:
    """The same MoE with each of `routers`, for each of `seeds` seeds, from the options' own on.

    Raises:
        ConfigError: no such router, one named twice, one that cannot serve this model, or a dense model.
    """
    require(seeds > 0, f"seeds is {seeds}; it must be positive")
    require(model.experts > 0, "a dense model has no router to compare", "set experts to 2 or more")
    require(len(set(routers)) == len(routers), f"a router is named twice: {', '.join(routers)}")
    configs = {name: replace(model, router=name).config(vocab_size, options.length) for name in routers}
    return [
        [
            Contender(name=name, config=config, options=replace(options, seed=options.seed + number))
            for name, config in configs.items()
        ]
        for number in range(seeds)
    ]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over several seeds."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and sample standard deviation."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean=statistics.fmean(values), deviation=deviation, values=tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}" if len(self.values) > 1 else f"{self.mean:.3f}"


def over_seeds(finished: Sequence[Sequence[Contender]]) -> dict[str, dict[str, Spread]]:
    """Every figure of each contender over seeds: bits per byte by domain and mean, tokens per second, routing.

    Args:
        finished: For each seed the contenders after their race, in the same order.
    """
    result: dict[str, dict[str, Spread]] = {}
    for same in zip(*finished, strict=True):
        figures = {"mean": Spread.of([one.evaluation.mean_bits_per_byte for one in same])}
        for domain in same[0].evaluation.bits_per_byte:
            figures[domain] = Spread.of([one.evaluation.bits_per_byte[domain] for one in same])
        figures["tokens_per_second"] = Spread.of([one.tokens_per_second for one in same])
        routed = [routing_figures(one) for one in same]
        for name in routed[0]:
            figures[name] = Spread.of([figure[name] for figure in routed])
        result[same[0].name] = figures
    return result


def routing_figures(contender: Contender) -> dict[str, float]:
    """What the router did, means over layers; empty for a dense model.

    `max_vio`, `dropped` (share of pairs) and `experts_per_token` are of training batches, over the last tenth of
    the steps; `max_vio_global` and `dead` (experts of all layers without a token) are of the held-out text.
    """
    late = [record.health.values() for record in contender.records[-max(len(contender.records) // 10, 1) :]]
    layers = [one for healths in late for one in healths]
    if not layers:
        return {}
    counts_DLE, experts_L = contender.evaluation.counts_DLE, contender.evaluation.experts_L
    assert counts_DLE is not None
    seen = [counts_E[:experts] for counts_E, experts in zip(counts_DLE.sum(0), experts_L, strict=True)]
    return {
        "max_vio": statistics.fmean(one.max_vio for one in layers),
        "max_vio_global": statistics.fmean(float(one_E.max() / one_E.mean()) - 1 for one_E in seen),
        "dead": float(sum((one_E == 0).sum() for one_E in seen)),
        "dropped": statistics.fmean(one.drop_rate for one in layers),
        "experts_per_token": statistics.fmean(one.pairs / max(one.tokens, 1) for one in layers),
    }

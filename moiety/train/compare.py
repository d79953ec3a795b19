"""Several models on the same text, in the same order, step by step side by side."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moiety import cost
from moiety.config import ModelConfig
from moiety.infer.generate import generate
from moiety.infer.options import SamplingOptions
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.train.data import TokenData
from moiety.train.evaluate import Evaluation
from moiety.train.loop import StepRecord, Stop, train
from moiety.train.options import TrainOptions

__all__ = ["Contender", "decode_speed", "race"]


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
        tokens = self.options.batch * self.options.accumulate * self.options.length
        return tokens * len(records) / sum(record.step_seconds for record in records)


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


def decode_speed(model: Transformer, *, tokens: int = 64) -> float:
    """Tokens per second of plain generation at batch 1, the first eighth left out as warm-up."""
    stream = generate(model, [0], max_tokens=tokens, sampling=SamplingOptions(temperature=0))
    for _ in range(tokens // 8):
        next(stream)
    begun = time.perf_counter()
    count = sum(1 for _ in stream)
    return count / (time.perf_counter() - begun)

"""A run's folder: what it was started with, its tokens, and how to go on with it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moiety import config as configs
from moiety import cost
from moiety.config import ModelConfig
from moiety.errors import FormatError, UsageError
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.observe.alarm import batch_advice
from moiety.observe.record import Recorder
from moiety.parallel.mesh import World
from moiety.storage import write_atomically
from moiety.train import corpus
from moiety.train.data import Batch, TokenData, build, prepare_tokenizer
from moiety.train.loop import StepRecord, Stop, train
from moiety.train.model_options import ModelOptions
from moiety.train.options import HeldOutOptions, TrainOptions
from moiety.train.routers import loss_terms
from moiety.train.state import latest_checkpoint

__all__ = [
    "PLAN",
    "Opened",
    "RunPlan",
    "Text",
    "describe",
    "held_out",
    "prepare_text",
    "read_plan",
    "resume",
    "start",
    "write_plan",
]

PLAN = "run.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Tokens to train on, the tokenizer that made them, and what a person should know about them."""

    data: TokenData
    tokenizer: Tokenizer
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run was started with; enough to resume it.

    Args:
        model: The model.
        train: How it is trained.
        sources: Texts as they were named; empty for the default corpus.
        bytes_per_domain: Of the default corpus.
        vocab_size: Asked of the tokenizer.
        fingerprint: Of the tokens, so that a resumed run cannot read other text unnoticed.
    """

    model: ModelConfig
    train: TrainOptions
    sources: tuple[str, ...]
    bytes_per_domain: int
    vocab_size: int
    fingerprint: str


def prepare_text(
    folder: Path,
    sources: Sequence[str],
    *,
    vocab_size: int,
    bytes_per_domain: int = 1_000_000,
    tokenizer: Tokenizer | None = None,
) -> Text:
    """Read texts, learn or take a tokenizer, and lay the tokens down in `folder`; quick the second time.

    Args:
        folder: `tokenizer/` and `tokens/` are made in here.
        sources: Files, folders, `FILE:domain=NAME` or `hf:ID`; none means the default corpus.
        vocab_size: Of a tokenizer to learn.
        bytes_per_domain: Size of the default corpus.
        tokenizer: Use this one instead of learning one.

    Raises:
        DataError: a text cannot be read or is too little.
    """
    read = (
        corpus.read_sources(sources) if sources else corpus.default_corpus(bytes_per_domain=bytes_per_domain)
    )
    split = corpus.split_held_out(read.documents)
    tokenizer = tokenizer or prepare_tokenizer(split, vocab_size, folder / "tokenizer")
    data = build(split, tokenizer, folder / "tokens")
    notes = dict.fromkeys((*read.notes, *split.notes, *data.notes))  # each once, in order
    silent = [domain for domain, size in data.sizes("held_out").items() if size["documents"] == 0]
    if silent:
        notes[f"too short to hold anything out, so not evaluated: {', '.join(silent)}"] = None
    return Text(data=data, tokenizer=tokenizer, notes=tuple(notes))


def held_out(
    sources: Sequence[str], tokenizer: Tokenizer, longest: int, options: HeldOutOptions
) -> tuple[dict[str, list[Batch]], tuple[str, ...]]:
    """The held-out text of each domain that has some, and what a person should know about it.

    Args:
        sources: As for `prepare_text`.
        tokenizer: The model's.
        longest: The model's longest sequence.
        options: How much of it, and how it is cut.

    Raises:
        DataError: a text cannot be read or is too little.
    """
    with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
        text = prepare_text(
            Path(folder),
            sources,
            vocab_size=0,
            bytes_per_domain=options.bytes_per_domain,
            tokenizer=tokenizer,
        )
        sizes, length = text.data.sizes("held_out"), options.length or min(longest, 512)
        batches = {
            domain: [*text.data.evaluation(domain, B=options.batch, S=length, limit=options.sequences)]
            for domain in text.data.domains
            if sizes[domain]["documents"]
        }
    return batches, text.notes


class Opened(NamedTuple):
    """A run ready to go: its plan, its text, the checkpoint to go on from, and what a person should know."""

    plan: RunPlan
    text: Text
    checkpoint: Path | None
    notes: tuple[str, ...]

    def steps(
        self,
        folder: Path,
        model: Transformer,
        stop: Stop | None = None,
        recorder: Recorder | None = None,
        world: World | None = None,
    ) -> Iterator[StepRecord]:
        """Train; arguments and errors as of `loop.train`."""
        return train(
            model,
            self.text.data,
            self.plan.train,
            run_folder=folder,
            tokenizer=self.text.tokenizer,
            resume=self.checkpoint,
            stop=stop,
            recorder=recorder,
            world=world,
        )


def start(
    folder: Path,
    sources: Sequence[str],
    model: ModelOptions,
    options: TrainOptions,
    *,
    vocab_size: int,
    bytes_per_domain: int,
) -> Opened:
    """A new run in `folder`; `write_plan` makes it one that can be resumed.

    Raises:
        UsageError: there is a run already.
        DataError: a text cannot be read or is too little.
        ConfigError: the options do not fit together.
    """
    config = model.config(vocab_size, options.length)  # refuse what cannot be before reading any text
    if config.moe is not None:
        loss_terms(config.moe, options)
    if (folder / PLAN).exists():
        raise UsageError(
            f"{folder} already holds a run", hint="--resume goes on with it; --out names another folder"
        )
    text = prepare_text(folder, sources, vocab_size=vocab_size, bytes_per_domain=bytes_per_domain)
    plan = RunPlan(
        model=model.config(text.tokenizer.vocab_size, options.length),
        train=options,
        sources=tuple(_anywhere(source) for source in sources),
        bytes_per_domain=bytes_per_domain,
        vocab_size=vocab_size,
        fingerprint=text.data.fingerprint,
    )
    text.data.sequences(options.length)  # refuse a text too short for one sequence before the run exists
    return Opened(plan, text, None, text.notes)


def resume(folder: Path) -> Opened:
    """The run in `folder` with its newest whole checkpoint; a damaged newer one is named in the notes.

    Raises:
        UsageError: there is no run, or its texts have changed.
        FormatError: `run.json` is damaged.
    """
    plan = read_plan(folder)
    text = prepare_text(
        folder, plan.sources, vocab_size=plan.vocab_size, bytes_per_domain=plan.bytes_per_domain
    )
    if plan.fingerprint != text.data.fingerprint:
        raise UsageError(
            "the texts are not those the run was started with", hint="start a new run in another --out folder"
        )
    found = latest_checkpoint(folder)
    return Opened(plan, text, found.path, (*text.notes, *found.damaged))


def _anywhere(source: str) -> str:
    """A source that means the same from any folder."""
    if source.startswith("hf:"):
        return source
    path, mark, domain = source.partition(":domain=")
    return f"{Path(path).resolve()}{mark}{domain}"


def write_plan(run_folder: Path, plan: RunPlan) -> None:
    """Put `run.json` into a run's folder."""
    run_folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(configs.to_dict(plan), indent=2)
    write_atomically(run_folder / PLAN, text.encode())


def read_plan(run_folder: Path) -> RunPlan:
    """What a run was started with.

    Raises:
        UsageError: there is no run in this folder.
        FormatError: `run.json` is damaged.
    """
    path = run_folder / PLAN
    if not path.is_file():
        raise UsageError(
            f"{run_folder} holds no run: there is no {PLAN}", hint="start one with `moiety train --out`"
        )
    try:
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(
            f"{path} is not JSON: {error}", hint="start the run anew in another folder"
        ) from error
    if isinstance(values, dict) and "parent" in values:
        raise UsageError(
            f"{run_folder} holds a run of `moiety finetune`",
            hint="go on with it by `moiety finetune --resume`",
        )
    return configs.from_dict(RunPlan, values)


def describe(plan: RunPlan, text_tokens: int) -> str:
    """What will be trained, on how much, for how many operations; a few lines."""
    counts, options = cost.parameters(plan.model), plan.train
    tokens = options.steps * options.batch * options.accumulate * options.length
    flops = tokens * cost.training_flops_per_token(plan.model, options.length // 2).total
    lines = [
        f"model: {_short(counts.total)} parameters, {_short(counts.active)} active for one token",
        f"text: {_short(text_tokens)} tokens; training: {_short(tokens)} tokens, {tokens / text_tokens:.2f} epochs, "
        f"{_short(flops)} FLOP",
    ]
    moe = plan.model.moe
    if moe is not None:
        step = options.batch * options.accumulate * options.length
        layers = [moe.at(layer) for layer in plan.model.moe_layers]
        least = min(layers, key=lambda one: one.experts_per_token / one.experts, default=moe)
        lines.append(batch_advice(step, least.experts, least.experts_per_token).message)
    if options.accumulate > 1 and options.balance_scope == "step" and moe is not None:
        lines.append(
            "balance over the whole step costs a second forward pass; --balance-scope micro_batch does not"
        )
    return "\n".join(lines)


def _short(number: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"

"""A fine-tuning run: a model and samples in a folder that can be gone on with, and what a person should know."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moiety import config as configs
from moiety import storage
from moiety.errors import ConfigError, FormatError, UsageError
from moiety.model import checkpoint, hub, quantized
from moiety.model.adapter_files import save_adapter
from moiety.model.adapter_options import LoraOptions
from moiety.model.convert import end_tokens, read_tokenizer
from moiety.model.template import TEMPLATE_CHARACTERS, ChatTemplate
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.observe.record import Recorder
from moiety.train.evaluate import autocast
from moiety.train.finetune_options import FinetuneOptions
from moiety.train.loop import StepRecord, Stop, train
from moiety.train.lora import adapt
from moiety.train.optim import build_optimizer
from moiety.train.options import TrainOptions
from moiety.train.preference import references
from moiety.train.run import PLAN
from moiety.train.samples import Samples, prepare
from moiety.train.state import latest_checkpoint
from moiety.train.trainable import ADAPTERS, ROUTER, Group, train_only

__all__ = [
    "PLAIN_TEMPLATE",
    "FinetunePlan",
    "Finetuning",
    "describe",
    "read_plan",
    "resume",
    "shown",
    "start",
]

SAMPLES, TOKENIZER = "samples.safetensors", "tokenizer"
LONGEST = 1024  # tokens of a sample where nobody says
PLAIN_TEMPLATE = (  # for a model that never had one: it needs no token but the end token
    "{{ bos_token or '' }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class FinetunePlan:
    """What a run was started with; enough to resume it.

    Args:
        parent: The model it began from.
        lora: Of the adapter, where one is trained.
        sources: Files of samples as they were named.
        options: What is learnt.
        train: How, as the loop takes it.
        domains: Names of the sources.
        most_units: Samples or pairs after which the run ends; 0 where steps were counted.
        answer_ends: Tokens that end an answer besides the end token.
        fingerprint: Of the samples, which are kept in the run's folder.
    """

    parent: str
    sources: tuple[str, ...]
    options: FinetuneOptions
    lora: LoraOptions
    train: TrainOptions
    domains: tuple[str, ...]
    most_units: int
    answer_ends: tuple[int, ...]
    fingerprint: str


class Finetuning(NamedTuple):
    """A run ready to go."""

    plan: FinetunePlan
    model: Transformer
    optimizer: torch.optim.Optimizer
    samples: Samples
    tokenizer: Tokenizer
    groups: tuple[Group, ...]
    checkpoint: Path | None
    notes: tuple[str, ...]

    def steps(
        self, folder: Path, stop: Stop | None = None, recorder: Recorder | None = None
    ) -> Iterator[StepRecord]:
        """Train; arguments and errors as of `loop.train`."""
        return train(
            self.model,
            self.samples,
            self.plan.train,
            run_folder=folder,
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            resume=self.checkpoint,
            stop=stop,
            recorder=recorder,
        )

    def write(self, folder: Path) -> None:
        """Make `folder` one that can be resumed."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / TOKENIZER)
        self.samples.save(folder / SAMPLES)
        text = json.dumps(configs.to_dict(self.plan), indent=2)
        storage.write_atomically(folder / PLAN, text.encode())


def _with_reference(samples: Samples, model: Transformer, options: FinetuneOptions, length: int) -> Samples:
    """Pairs with what the model makes of them before it learns."""
    products = autocast(options.dtype, next(model.parameters()).device)
    return samples.with_reference(references(model, samples.everything(options.batch * length), products))


def start(
    folder: Path,
    parent: str,
    sources: Sequence[str],
    options: FinetuneOptions,
    *,
    lora: LoraOptions | None = None,
    template: str = "",
) -> Finetuning:
    """A new run; `Finetuning.write` makes the folder one that can be resumed.

    Args:
        folder: Of the run.
        parent: A checkpoint or run folder, a GGUF file, or `owner/name` on the hub.
        sources: See `samples.prepare`.
        options: What is learnt.
        lora: Of the adapter, where `options.train` names adapters.
        template: A file with a chat template, or "plain"; empty takes the model's own.

    Raises:
        UsageError: there is a run already, no model, or no source.
        DataError: a line of a source is not what is allowed.
        ConfigError: the options do not fit the model.
    """
    if (folder / PLAN).exists():
        raise UsageError(
            f"{folder} already holds a run", hint="--resume goes on with it; --out names another folder"
        )
    if not sources:
        raise UsageError("there is nothing to train on", hint="--data chats.jsonl")
    place = _place(parent)
    tokenizer, length = _tokenizer(place, template), _length(place, options)
    found = prepare(sources, tokenizer, options, length)
    new = [token for token in found.ends if token not in (tokenizer.end_id, *tokenizer.answer_ends)]
    tokenizer.answer_ends += tuple(new)
    names = {token: name for name, token in tokenizer.special_ids().items()}
    notes = [
        *found.notes,
        *(f"answers end with {names[token]}, which from now on ends an answer" for token in new),
    ]
    model, samples = _load(place, options), found.samples
    if samples.answers == 2:
        samples = _with_reference(samples, model, options, length)
    groups, factors = _learning(model, options, lora or LoraOptions())
    most_units = 0 if options.steps else max(round(options.epochs * samples.units), 1)
    samples.most_units = most_units
    plan = FinetunePlan(
        parent=str(Path(parent).resolve()) if Path(parent).exists() else parent,
        sources=tuple(sources),
        options=options,
        lora=lora or LoraOptions(),
        train=_training(options, model, groups, samples, length),
        domains=samples.domains,
        most_units=most_units,
        answer_ends=tokenizer.answer_ends,
        fingerprint=samples.fingerprint,
    )
    optimizer = _optimizer(model, plan, factors)
    return Finetuning(plan, model, optimizer, samples, tokenizer, tuple(groups), None, tuple(notes))


def resume(folder: Path) -> Finetuning:
    """The run in `folder` with its newest whole checkpoint; a damaged newer one is named in the notes.

    Raises:
        UsageError: there is no such run.
        FormatError: it is damaged.
    """
    plan = read_plan(folder)
    found = latest_checkpoint(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    tokenizer.answer_ends = plan.answer_ends
    samples = Samples.load(
        folder / SAMPLES,
        plan.domains,
        pack=plan.options.pack,
        beta=plan.options.beta,
        fingerprint=plan.fingerprint,
    )
    samples.most_units = plan.most_units
    whole = None if plan.options.adapts else found.path  # a checkpoint of an adapter is not the model
    model = _load(whole or _place(plan.parent), plan.options)
    groups, factors = _learning(model, plan.options, plan.lora)
    optimizer = _optimizer(model, plan, factors)
    return Finetuning(plan, model, optimizer, samples, tokenizer, tuple(groups), found.path, found.damaged)


def read_plan(folder: Path) -> FinetunePlan:
    """What a run was started with.

    Raises:
        UsageError: there is no fine-tuning run in this folder.
        FormatError: `run.json` is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no run: there is no {PLAN}", hint="start one with `moiety finetune`"
        )
    values: dict[str, Any] = storage.read_json(path)
    if "parent" not in values:
        raise UsageError(
            f"{folder} holds a run of `moiety train`", hint="go on with it by `moiety train --resume`"
        )
    return configs.from_dict(FinetunePlan, values)


def describe(run: Finetuning) -> str:
    """What will be trained on what, in a few lines."""
    plan, options = run.plan, run.plan.train
    sizes, held = run.samples.sizes(), run.samples.sizes("held_out")
    what = "pairs" if run.samples.answers == 2 else "samples"
    lines = [
        f"{name}: {size['documents']:,} {what}, {size['tokens']:,} tokens, {size['learnt']:,} of them learnt; "
        f"{held[name]['documents']:,} held out"
        for name, size in sizes.items()
    ]
    rows = "behind each other, none seeing another" if run.samples.pack else "in padded rows"
    lines.append(
        f"{options.steps:,} steps of {options.accumulate} micro-batches with room for "
        f"{options.batch * options.length:,} tokens, samples {rows}"
    )
    if run.model.config.moe is not None:
        balance = dict(text.split("=") for text in options.losses)["load"]
        routers = "frozen" if options.freeze_router else "trained"
        off = float(balance) == 0
        lines.append(f"routers are {routers}; balance loss: {'off' if off else balance}")
    if run.samples.answers == 2:
        lines.append(
            f"preference loss (DPO) with beta {plan.options.beta}; the reference is the model as it was"
        )
    return "\n".join(lines)


def shown(run: Finetuning, place: int = 0) -> str:
    """A sample as text, what is learnt of it in double brackets."""
    sample, names = (
        run.samples.sample(place),
        {token: name for name, token in run.tokenizer.special_ids().items()},
    )
    text, written, before = "", b"", False
    for token, learnt in zip((*sample.tokens, -1), (*sample.learnt, False), strict=True):
        if learnt != before or token in names or token < 0:
            text, written = text + written.decode("utf-8", "replace"), b""
        if learnt != before:
            text += "[[" if learnt else "]]"
        before = learnt
        if token in names:
            text += names[token]
        elif token >= 0:
            written += run.tokenizer.bytes_of((token,))
    return text


def _load(place: Path, options: FinetuneOptions) -> Transformer:
    """The model as it is trained: in float32; under adapters as it is stored, but for routers that train."""
    model = checkpoint.load(place, dtype=None if options.adapts else torch.float32)
    if quantized.description(model) and not options.adapts:
        raise UsageError(
            f"{place} is packed, and packed weights do not learn", hint="--train adapters (QLoRA)"
        )
    return model


def _learning(
    model: Transformer, options: FinetuneOptions, lora: LoraOptions
) -> tuple[list[Group], dict[str, float]]:
    """`train_only`, with an adapter where one is named.

    Raises:
        ConfigError: as `train_only` and `lora.adapt`, or an adapter and weights that it freezes.
        UsageError: PEFT has no layout for it.
    """
    if options.adapts:
        others = {text.partition("=")[0] for text in options.train} - {ADAPTERS, ROUTER}
        if others or lora.router:
            raise ConfigError(
                f"train names adapters and {', '.join(sorted(others)) or 'lora has router'}; weights under adapters "
                "are frozen",
                hint=f"--train {ADAPTERS} --train {ROUTER} trains routers too",
            )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(options.seed)
            adapt(model, lora)
        with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
            save_adapter(model, Path(folder) / "tried")  # better refused now than at the first checkpoint
    groups, factors = train_only(model, options.train, options.learning_rate)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # steps that bfloat16 would lose
    return groups, factors


def _training(
    options: FinetuneOptions, model: Transformer, groups: Sequence[Group], samples: Samples, length: int
) -> TrainOptions:
    """The loop's options, the number of steps worked out."""
    routers_train = any(one.name == "router" and one.learning_rate for one in groups)
    steps = options.steps
    if not steps:
        count = samples.micro_batches(
            room=options.batch * length, seed=options.seed, units=samples.most_units
        )
        steps = -(-count // options.accumulate)
    moe = model.config.moe
    return options.of_training(
        steps=steps,
        length=length,
        balance=0.0 if moe is None else options.balance_of(moe.balance_loss, routers_train),
        z=moe.z_loss if moe is not None and routers_train else 0.0,
        routers_train=routers_train,
    )


def _optimizer(model: Transformer, plan: FinetunePlan, factors: dict[str, float]) -> torch.optim.Optimizer:
    options = plan.train
    return build_optimizer(
        model,
        weight_decay=options.weight_decay,
        betas=(options.beta1, options.beta2),
        router_scale=1.0,
        factors=factors,
    )


def _place(parent: str) -> Path:
    """The checkpoint that a name means; of a run its newest whole one."""
    if (Path(parent) / "checkpoints").is_dir():
        newest = latest_checkpoint(parent).path
        if newest is None:
            raise UsageError(f"{parent} is a run without a whole checkpoint", hint="give another model")
        return newest
    return hub.resolve(parent)


def _length(place: Path, options: FinetuneOptions) -> int:
    longest = checkpoint.load_config(place).max_positions
    if options.length > longest:
        raise ConfigError(f"length is {options.length}; the model's longest sequence is {longest}")
    return options.length or min(longest, LONGEST)


def _tokenizer(place: Path, template: str) -> Tokenizer:
    """The model's, with the template that was named, if any, and with all tokens that end an answer."""
    tokenizer = read_tokenizer(place)
    if template:
        tokenizer.chat_template = _template(template, tokenizer)
    tokenizer.answer_ends = tuple(token for token in end_tokens(place) if token != tokenizer.end_id)
    return tokenizer


def _template(named: str, tokenizer: Tokenizer) -> ChatTemplate:
    text = PLAIN_TEMPLATE
    if named != "plain":
        try:
            text = Path(named).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"cannot read the template {named}: {error.strerror}", hint="--template plain is one of ours"
            ) from error
        except UnicodeDecodeError as error:
            raise FormatError(f"{named} is not UTF-8: {error.reason}") from error
        if len(text) > TEMPLATE_CHARACTERS:
            raise FormatError(f"{named} has {len(text):,} characters; allowed are {TEMPLATE_CHARACTERS:,}")
    special = {**tokenizer.special_tokens, "eos_token": tokenizer.end_token}
    return ChatTemplate(text, special_tokens=special, origin=f"the template {named}")

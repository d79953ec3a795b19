"""A text, a tokenizer and models small enough that a run of thirty steps takes a fraction of a second."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.model.transformer import Transformer
from moiety.train.corpus import Document, Split, split_held_out
from moiety.train.data import TokenData, build
from moiety.train.loop import StepRecord, moe_layers, train
from moiety.train.model_options import ModelOptions
from moiety.train.optim import build_optimizer
from moiety.train.options import TrainOptions
from moiety.train.routers import down_scale, down_scales
from moiety.train.state import load_state

LENGTH = 32


def documents() -> list[Document]:
    """Two domains of lines that repeat themselves."""
    animals = [
        Document("animals", f"the cat {i} sat on the mat and saw {i % 7} birds.\n" * 6) for i in range(30)
    ]
    return animals + [
        Document("code", f"x = {i} + {i * i}\nprint(x)  # {i} squared\n" * 6) for i in range(30)
    ]


def text(folder: Path) -> tuple[TokenData, Tokenizer]:
    """Token files of `documents` in `folder`, and the tokenizer: about 300 entries, 200 sequences of 32."""
    split: Split = split_held_out(documents())
    tokenizer = train_tokenizer([document.text for document in split.train], 300)
    return build(split, tokenizer, folder), tokenizer


def shape(**changes: Any) -> ModelOptions:
    """A model of one or two narrow layers."""
    return ModelOptions(
        **{
            "d_model": 32,
            "layers": 2,
            "heads": 2,
            "d_ff": 32,
            "experts": 4,
            "experts_per_token": 2,
            **changes,
        }
    )


def model(vocab_size: int, *, seed: int = 0, **changes: Any) -> Transformer:
    """A fresh model of `shape`."""
    torch.manual_seed(seed)
    return Transformer(shape(**changes).config(vocab_size, LENGTH))


def options(**changes: Any) -> TrainOptions:
    """A short run that evaluates and saves at its end only."""
    usual = {"steps": 30, "batch": 8, "length": LENGTH, "learning_rate": 1e-2, "warmup": 3}
    return TrainOptions(**{**usual, "evaluate_every": 0, "evaluate_sequences": 4, "save_every": 0, **changes})


def run(net: Transformer, data: TokenData, how: TrainOptions, **given: Any) -> list[StepRecord]:
    """All records of a run."""
    return list(train(net, data, how, **given))


def values(net: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def moments(path: Path, net: Transformer, how: TrainOptions) -> dict[str, Tensor]:
    """The optimizer's state in a checkpoint, by parameter and kind; loads the weights into `net` too."""
    optimizer = build_optimizer(
        net,
        weight_decay=how.weight_decay,
        betas=(how.beta1, how.beta2),
        router_scale=how.router_rate,
        down_scale=down_scale(net.config.moe, how),
        down_scales=down_scales(net.config.moe, how),
    )
    load_state(path, net, optimizer)
    return {
        f"{name}:{kind}": value.clone()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind, value in optimizer.state[parameter].items()
    }


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert first.keys() == second.keys() and first, sorted(first.keys() ^ second.keys())
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), (name, (value - second[name]).abs().max())


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> set[str]:
    """Names whose values are not equal."""
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Largest distance of two tensors of the same name, relative to the first one's norm."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)


@dataclass
class Poison:
    """Puts NaN into a forward pass or a gradient, in given steps and nowhere else.

    Ask it (`poison.due`) from a hook; tell it of each finished step with `poison.step = ...`.
    """

    steps: frozenset[int]
    step: int = 0
    used: list[int] = field(default_factory=list)

    @property
    def due(self) -> bool:
        """True in a poisoned step, which is noted."""
        if self.step not in self.steps:
            return False
        self.used.append(self.step)
        return True

    def over(self, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
        """The records, counting the steps; one that is drawn is one that is over."""
        for record in records:
            self.step = record.state.step
            yield record


def poison_loss(net: Transformer, poison: Poison) -> None:
    """The embedding of one token becomes NaN, as a damaged row would."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not (module.training and poison.due):
            return None
        output = output.clone()
        output[0, 3] = torch.nan
        return output

    net.embed.register_forward_hook(hook)


def poison_logits(net: Transformer, poison: Poison) -> None:
    """A router's weight is NaN during the forward pass of a poisoned step, and afterwards what it was."""
    weight = moe_layers(net)[0].gate.weight
    kept = weight.detach().clone()

    def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if module.training and poison.due:
            kept.copy_(weight.data)
            weight.data[1, 2] = torch.nan  # `data`: autograd is not to notice

    def after(module: nn.Module, given: tuple[Tensor, ...], output: object) -> None:
        if weight.data.isnan().any():
            weight.data.copy_(kept)

    net.register_forward_pre_hook(before)
    net.register_forward_hook(after)


def poison_gradient(net: Transformer, poison: Poison) -> None:
    """One number in one expert's gradient is NaN."""

    def hook(gradient: Tensor) -> Tensor | None:
        if not poison.due:
            return None
        gradient = gradient.clone()
        gradient[2, 5, 7] = torch.nan
        return gradient

    moe_layers(net)[1].experts.down.register_hook(hook)


def twin(net: Transformer) -> Transformer:
    """The same model once more."""
    return copy.deepcopy(net)

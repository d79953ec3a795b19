"""A stored model whose tensors are read when they are wanted, and run a block at a time: for models beyond memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moiety.config import ModelConfig
from moiety.model.context import forward_context
from moiety.model.transformer import ModelOutput, Transformer
from moiety.moe.layer import MoEOutput
from moiety.routing import Routing

__all__ = ["Parts", "hollow", "run", "shapes_of"]

See = Callable[[int, nn.Module, Tensor, Routing | None], object]


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A model that is open, every header checked, or one that is still to be made of another's tensors.

    Args:
        config: What it is.
        dtypes: What each of our tensors is stored as.
        read: One of our tensors by its name, as stored.
    """

    config: ModelConfig
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]

    def fetch(self, name: str, expert: int | None) -> Tensor:
        """A tensor, or one matrix of a stack."""
        return self.read(name) if expert is None else self.read(name)[expert]


def hollow(config: ModelConfig, dtypes: Mapping[str, torch.dtype] | None = None) -> Transformer:
    """A model of shapes alone, on the meta device; `dtypes` are those of all its tensors."""
    with torch.device("meta"):
        model = Transformer(config, initialize=False)
    if dtypes is not None:
        state = {name: tensor.to(dtypes[name]) for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    return model.eval()


def shapes_of(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model and its shape."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def run(
    parts: Parts,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    see: See | None = None,
    *,
    dtype: torch.dtype | None = None,
    stored_as: torch.dtype | None = None,
) -> list[ModelOutput]:
    """What `Transformer.forward` gives for some text, with its bits but without the routing.

    In memory are one block, the text's hidden states, and at the end the embedding or head.

    Args:
        parts: The model; each tensor is asked for once, the embedding of a tied one twice.
        batches: Tokens, int64 (B, S), and which of them are no padding, or None.
        see: Called for each block: its number, its feed-forward, what went in (T, D), and the routing if there is one.
        dtype: To compute in; None takes the weights as they are.
        stored_as: Round the weights to this first.
    """
    model = hollow(parts.config)
    contexts = [
        forward_context(parts.config, tokens_BS, valid_BS=valid_BS) for tokens_BS, valid_BS in batches
    ]

    def read(name: str) -> Tensor:
        tensor = parts.read(name)
        if name.endswith("selection_bias"):
            return tensor
        tensor = tensor.to(stored_as or tensor.dtype)
        return tensor.to(dtype or tensor.dtype)

    with _filled(model.embed, "embed.", read):
        hidden = [model.embedded(tokens_BS) for tokens_BS, _ in batches]
    for layer, block in enumerate(model.blocks):
        with _filled(block, f"blocks.{layer}.", read), _watched(block, layer, see):
            for place, context in enumerate(contexts):
                hidden[place], _ = block(hidden[place], context)
    ends = {name: read(name) for name in model.state_dict() if not name.startswith(("blocks.", "embed."))}
    if parts.config.tied:
        ends["embed.weight"] = read("embed.weight")
    model.load_state_dict(ends, assign=True, strict=False)
    return [model.ended(one, {}) for one in hidden]


@contextmanager
def _filled(module: nn.Module, prefix: str, read: Callable[[str], Tensor]) -> Iterator[None]:
    """A part of the model with its weights, which go again."""
    module.load_state_dict({name: read(f"{prefix}{name}") for name in module.state_dict()}, assign=True)
    yield
    module.to("meta")


@contextmanager
def _watched(block: nn.Module, layer: int, see: See | None) -> Iterator[None]:
    if see is None:
        yield
        return

    def seen(module: nn.Module, given: tuple[Tensor], named: Mapping[str, Any], found: object) -> None:
        routing = found.routing if isinstance(found, MoEOutput) else None
        see(layer, module, given[0].flatten(0, -2), routing)

    handle = block.get_submodule("feed_forward").register_forward_hook(seen, with_kwargs=True)
    yield
    handle.remove()

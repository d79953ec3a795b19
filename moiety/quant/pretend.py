"""Models of known shapes with random packed weights: what they answer means nothing, how fast they are does."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from moiety import cost, registry
from moiety.config import ModelConfig
from moiety.errors import ConfigError, UsageError
from moiety.formats import format_named
from moiety.formats.tiles import PackedWeight, pack
from moiety.model.slots import install, room, slots
from moiety.model.transformer import Transformer
from moiety.quant.quantize import policy_named

__all__ = ["packed_model", "shape_named"]


def shape_named(name: str, layers: int = 0) -> ModelConfig:
    """A decoder of the registry, cut to its first layers; 0 keeps all.

    Raises:
        ConfigError: there is none of this name, it is no decoder, or it has not so many layers.
    """
    config = registry.lookup(name)
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"{name} is an encoder-decoder, which the engine does not run")
    if not 0 <= layers <= config.layers:
        raise ConfigError(f"layers is {layers}; {name} has {config.layers}", hint="0 keeps all")
    return _first_layers(config, layers) if layers else config


def _first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    def first(named: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if named is None else tuple(layer for layer in named if layer < layers)

    attention, moe = config.attention, config.moe
    return replace(
        config,
        layers=layers,
        dense_layers=first(config.dense_layers) or (),
        attention=replace(
            attention,
            window_layers=first(attention.window_layers),
            rope_layers=first(attention.rope_layers),
        ),
        moe=None
        if moe is None
        else replace(moe, per_layer=tuple(one for one in moe.per_layer if one[0] < layers)),
    )


def _fill(packed: PackedWeight) -> None:
    """Give tiles a meaning; a few random rows are packed and repeated, because packing takes longer than measuring."""
    few = pack(torch.randn(64, packed.columns) * packed.columns**-0.5, packed.form).tiles[0]
    blocks = packed.tiles.shape[1]
    packed.tiles.copy_(few.repeat(-(-blocks // len(few)), 1, 1)[:blocks])


def packed_model(config: ModelConfig, formats: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose matrices are random tiles, and whose other weights are random.

    Args:
        config: The shape.
        formats: As of `policy_named`; a matrix that it would leave unpacked is float32.
        dtype: Of weights that are no packed matrices.

    Raises:
        ConfigError: no such format.
        UsageError: it is larger than this machine's memory.
    """
    policy = policy_named(formats)
    bits = min((format_named(policy.experts).bits_per_weight if policy.experts else 32.0), 32.0)
    needed, there = cost.weight_bytes(config, bits), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UsageError(
            f"this model needs {needed / 1e9:.0f} GB, and this machine has {there / 1e9:.0f}",
            hint="ask for fewer layers (--layers 4): how fast they are says how fast all would be",
        )
    with torch.device("meta"):
        model = Transformer(config, initialize=False)
    for path, group in slots(model).items():
        choices = [policy(slot.parameter, (slot.rows, slot.columns)) or "f32" for slot in group]
        made = room(group, [format_named(choice) for choice in choices])
        for packed in made.weights.values():
            _fill(packed)
        install(model, path, [made])
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.empty(parameter.shape, dtype=dtype)  # of an embedding two would be too many
            filled.fill_(1.0) if parameter.dim() == 1 else filled.normal_(std=0.02)
            setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:  # biases of packed matrices, and of the choice of experts
                module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return model.eval()

"""Models of real shapes with random packed weights: speed does not depend on what the numbers are."""

from __future__ import annotations

from dataclasses import replace

import torch

from moiety import registry
from moiety.config import ModelConfig
from moiety.formats.tiles import PackedWeight, pack, shape_of
from moiety.model.slots import Group, install, slots
from moiety.model.transformer import Transformer
from moiety.quant.quantize import policy_named

__all__ = ["packed_model", "shape_named"]


def shape_named(name: str, layers: int = 0) -> ModelConfig:
    """A decoder of the registry, cut to some layers; 0 keeps all."""
    config = registry.lookup(name)
    assert isinstance(config, ModelConfig), name
    return replace(config, layers=layers) if layers else config


def _random_tiles(name: str, experts: int, rows: int, columns: int, interleaved: bool) -> PackedWeight:
    """A stack of matrices; a few random rows are packed and repeated, because packing takes longer than measuring."""
    from moiety.formats import format_named

    form = format_named(name)
    shape = shape_of(form, experts=experts, rows=rows, columns=columns, interleaved=interleaved)
    few = pack(torch.randn(64, columns) * columns**-0.5, form).tiles[0]
    tiles = torch.empty(shape, dtype=torch.uint8)
    tiles.copy_(few.repeat(-(-shape[1] // len(few)), 1, 1)[: shape[1]])
    return PackedWeight(
        form=form, experts=experts, rows=rows, columns=columns, interleaved=interleaved, tiles=tiles
    )


def packed_model(config: ModelConfig, formats: str) -> Transformer:
    """A model whose matrices are random tiles, and whose other weights are random float32."""
    with torch.device("meta"):
        model = Transformer(config, initialize=False)
    policy = policy_named(formats)
    for path, group in slots(model).items():
        weights = {}
        for slot in group:
            choice = policy(slot.parameter, (slot.rows, slot.columns))
            assert choice is not None, slot
            weights[slot.leaf] = _random_tiles(
                choice, slot.experts, slot.rows, slot.columns, slot.interleaved
            )
        install(model, path, [Group(weights)])
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = (
                    torch.ones(parameter.shape)
                    if parameter.dim() == 1
                    else torch.randn(parameter.shape) * 0.02
                )
                setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
    return model.eval()

"""moiety: the toolkit for Mixture-of-Experts transformers.

Names are imported on first use, so `import moiety` itself loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moiety.config import AttentionConfig, ModelConfig, MoEConfig
    from moiety.errors import MoietyError
    from moiety.infer.engine import Engine
    from moiety.infer.generate import generate
    from moiety.infer.open import load
    from moiety.model.tokenizer import Tokenizer
    from moiety.model.transformer import Transformer
    from moiety.moe.capacity import Capacity
    from moiety.moe.layer import MoE
    from moiety.moe.routers import (
        Base,
        CostAware,
        DenseMixer,
        ExpertChoice,
        ExpertDropout,
        Explore,
        GShard,
        Hash,
        NoisyTopK,
        ReLU,
        SigmoidTopK,
        Sinkhorn,
        SoftToSparse,
        SparseMixer,
        StraightThrough,
        Switch,
        Tempered,
        TopK,
        TopP,
    )
    from moiety.moe.soft import SoftMoE
    from moiety.routing import Routing
    from moiety.schedule import Schedule

__all__ = [
    "AttentionConfig",
    "Base",
    "Capacity",
    "CostAware",
    "DenseMixer",
    "Engine",
    "ExpertChoice",
    "ExpertDropout",
    "Explore",
    "GShard",
    "Hash",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "MoietyError",
    "NoisyTopK",
    "ReLU",
    "Routing",
    "Schedule",
    "SigmoidTopK",
    "Sinkhorn",
    "SoftMoE",
    "SoftToSparse",
    "SparseMixer",
    "StraightThrough",
    "Switch",
    "Tempered",
    "Tokenizer",
    "TopK",
    "TopP",
    "Transformer",
    "generate",
    "load",
]

_HOMES = {
    "AttentionConfig": "moiety.config",
    "Base": "moiety.moe.routers",
    "Capacity": "moiety.moe.capacity",
    "CostAware": "moiety.moe.routers",
    "DenseMixer": "moiety.moe.routers",
    "Engine": "moiety.infer.engine",
    "ExpertChoice": "moiety.moe.routers",
    "ExpertDropout": "moiety.moe.routers",
    "Explore": "moiety.moe.routers",
    "GShard": "moiety.moe.routers",
    "Hash": "moiety.moe.routers",
    "MoE": "moiety.moe.layer",
    "MoEConfig": "moiety.config",
    "ModelConfig": "moiety.config",
    "MoietyError": "moiety.errors",
    "NoisyTopK": "moiety.moe.routers",
    "ReLU": "moiety.moe.routers",
    "Routing": "moiety.routing",
    "Schedule": "moiety.schedule",
    "SigmoidTopK": "moiety.moe.routers",
    "Sinkhorn": "moiety.moe.routers",
    "SoftMoE": "moiety.moe.soft",
    "SoftToSparse": "moiety.moe.routers",
    "SparseMixer": "moiety.moe.routers",
    "StraightThrough": "moiety.moe.routers",
    "Switch": "moiety.moe.routers",
    "Tempered": "moiety.moe.routers",
    "Tokenizer": "moiety.model.tokenizer",
    "TopK": "moiety.moe.routers",
    "TopP": "moiety.moe.routers",
    "Transformer": "moiety.model.transformer",
    "generate": "moiety.infer.generate",
    "load": "moiety.infer.open",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moiety' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

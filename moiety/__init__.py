"""moiety: the toolkit for Mixture-of-Experts transformers.

Names are imported on first use, so `import moiety` itself loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moiety.config import AttentionConfig, ModelConfig, MoEConfig
    from moiety.errors import MoietyError
    from moiety.infer.generate import generate
    from moiety.model.checkpoint import load
    from moiety.model.tokenizer import Tokenizer
    from moiety.model.transformer import Transformer
    from moiety.moe.layer import MoE
    from moiety.moe.routers import SigmoidTopK, Switch, TopK
    from moiety.routing import Routing

__all__ = [
    "AttentionConfig",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "MoietyError",
    "Routing",
    "SigmoidTopK",
    "Switch",
    "Tokenizer",
    "TopK",
    "Transformer",
    "generate",
    "load",
]

_HOMES = {
    "AttentionConfig": "moiety.config",
    "MoE": "moiety.moe.layer",
    "MoEConfig": "moiety.config",
    "ModelConfig": "moiety.config",
    "MoietyError": "moiety.errors",
    "Routing": "moiety.routing",
    "SigmoidTopK": "moiety.moe.routers",
    "Switch": "moiety.moe.routers",
    "Tokenizer": "moiety.model.tokenizer",
    "TopK": "moiety.moe.routers",
    "Transformer": "moiety.model.transformer",
    "generate": "moiety.infer.generate",
    "load": "moiety.model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moiety' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

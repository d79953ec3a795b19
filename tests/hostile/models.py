"""The good models that hostile ones are made from."""

from __future__ import annotations

from pathlib import Path

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.model.checkpoint import save
from moiety.model.transformer import Transformer

__all__ = ["CONFIG", "write_models"]

CONFIG = ModelConfig(
    vocab_size=19,
    d_model=8,
    layers=2,
    attention=AttentionConfig(heads=2, kv_heads=1, head_dim=6),
    d_ff=5,
    moe=MoEConfig(experts=3, experts_per_token=2, d_ff=5),
)


def write_models(folder: Path) -> tuple[Path, Path]:
    """One model, in one file and in shards."""
    model = Transformer(CONFIG)
    save(model, folder / "plain")
    save(model, folder / "sharded", max_shard_bytes=2500)
    return folder / "plain", folder / "sharded"

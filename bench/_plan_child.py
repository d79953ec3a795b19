"""One model in a process of its own, for bench/plan.py: python bench/_plan_child.py SHAPE LAYERS FORMAT BATCHES PROMPT.

Answers with one line of JSON: most bytes that were resident while it ran, tokens per second of each batch and prompt.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
from pathlib import Path

import torch
from _models import packed_model, shape_named

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.infer.measure import decoding, prefill
from moiety.model.transformer import Transformer
from moiety.plan.weights import PLAIN
from moiety.train.host import give_back_freed_memory, peak_memory_bytes

TOKENS = 32
SMALL = ModelConfig(
    vocab_size=4096,
    d_model=256,
    layers=6,
    d_ff=512,
    attention=AttentionConfig(heads=8, kv_heads=4, head_dim=32),
    moe=MoEConfig(experts=16, experts_per_token=4, d_ff=256),
    max_positions=1024,
)


def config_of(shape: str, layers: int) -> ModelConfig:
    """A shape of the registry, or the small one."""
    if shape == "small":
        return dataclasses.replace(SMALL, layers=layers or SMALL.layers)
    return shape_named(shape, layers)


def model_of(config: ModelConfig, form: str) -> Transformer:
    """With random weights, packed or plain."""
    if form not in PLAIN:
        return packed_model(config, form)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[form]
    with torch.no_grad():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that no second copy is ever made
        model = Transformer(config)
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def main() -> None:
    """Run everything, and say what came of it."""
    shape, layers, form, batches, prompt = sys.argv[1:]
    model = model_of(config_of(shape, int(layers)), form)
    torch.set_grad_enabled(False)
    small = torch.ones(1 << 16, dtype=torch.uint8)
    sizes = [int(batch) for batch in batches.split(",")]
    decoded = {size: decoding(model, size, tokens=TOKENS, memory=small).tokens_per_s for size in sizes}
    prompted = prefill(model, int(prompt)).tokens_per_s
    give_back_freed_memory()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the most that is resident is counted from here on
    for size in sizes:
        decoding(model, size, tokens=TOKENS, memory=small)
    prefill(model, int(prompt), repeats=1)
    print(json.dumps({"memory": peak_memory_bytes(), "decode": decoded, "prefill": prompted}))


if __name__ == "__main__":
    main()

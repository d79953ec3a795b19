"""One side of `finetune.py`, a process of its own as users have it: for each line on stdin a step and a line about it.

python bench/_finetune_child.py SPEC.json. Steps are forward, loss, backward and AdamW; step i has the same tokens on
every side, and no other step has them, so that experts get other numbers of rows each time.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moiety.model import checkpoint
from moiety.model.adapter_files import load_adapter
from moiety.model.transformer import Transformer
from moiety.quant.pretend import packed_model, shape_named
from moiety.train.host import LARGEST_KEPT, keep_freed_memory, peak_memory_bytes
from moiety.train.lora import LoraOptions, adapt

__all__ = ["OPTIONS", "initialized", "main"]

OPTIONS = LoraOptions(rank=8, targets=("attention", "experts"))

LossOf = Callable[[Tensor], Tensor]


def our_loss(model: Transformer) -> LossOf:
    """Mean of the tokens' losses; routers give no balance loss, because they are frozen."""
    return lambda tokens: model(tokens).cross_entropy(tokens.roll(-1, 1)) / tokens.numel()


def peft_model(folder: Path, dtype: torch.dtype, way: str) -> nn.Module:
    """The saved model in transformers with the saved adapter, to be trained."""
    import peft
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype, experts_implementation=way)
        found: nn.Module = peft.PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    return found


def peft_loss(model: nn.Module) -> LossOf:
    """The same in transformers."""

    def loss(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())

    return loss


def initialized(make: Callable[[], Transformer], dtype: torch.dtype) -> Transformer:
    """A random model that never was in another dtype."""
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def built(spec: dict[str, Any]) -> tuple[nn.Module, LossOf]:
    """The model of a side, `ours` and `peft` from what was saved, `shape` with random weights, plain or packed."""
    dtype = getattr(torch, spec["dtype"])
    if spec["side"] == "shape":
        torch.manual_seed(0)
        if spec["format"]:
            ours = packed_model(shape_named(spec["shape"], spec["layers"]), spec["format"], dtype)
        else:
            ours = initialized(lambda: Transformer(shape_named(spec["shape"], spec["layers"])), dtype)
        ours.checkpointing = spec["checkpointing"]
        adapt(ours, OPTIONS)
        return ours, our_loss(ours)
    folder = Path(spec["folder"])
    if spec["side"] == "peft":
        theirs = peft_model(folder, dtype, spec["way"])
        return theirs, peft_loss(theirs)
    ours = checkpoint.load(folder / "base", dtype=dtype)
    ours.requires_grad_(False)
    load_adapter(ours, folder / "adapter")
    return ours, our_loss(ours)


def main() -> int:
    """Build, say how much learns, then step after step."""
    spec = json.loads(sys.argv[1])
    keep_freed_memory(0 if spec["side"] == "peft" else LARGEST_KEPT)
    model, loss_of = built(spec)
    model.train()
    learning = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)
    print(json.dumps({"learning": sum(one.numel() for one in learning)}), flush=True)
    for number, _ in enumerate(sys.stdin):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(spec["vocabulary"], tuple(spec["tokens"]), generator=generator)
        begun = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begun
        said = {"seconds": seconds, "loss": float(loss.detach()), "peak": peak_memory_bytes()}
        print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

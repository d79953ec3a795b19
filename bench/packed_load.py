"""Time from nothing to a packed model that is ready, its files in the page cache: the layout of OLMoE-1B-7B in int4.

The model has 4 GB (--quick: 0.5 GB). Its numbers mean nothing, and cost what any others do: nothing is read before it
is used. Each load is a process of its own; torch is imported before the clock starts.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from _harness import Row, arguments, finish

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.formats import FORMATS
from moiety.model.slots import install, room, slots
from moiety.model.transformer import Transformer

OLMOE = ModelConfig(
    vocab_size=50_304,
    d_model=2048,
    layers=16,
    attention=AttentionConfig(heads=16, kv_heads=16, head_dim=128, qk_norm="full"),
    d_ff=1024,
    moe=MoEConfig(experts=64, experts_per_token=8, d_ff=1024),
)
LIMIT_S = 3.0
CHILD = """
import sys, time
import moiety, torch
begun = time.perf_counter()
model = moiety.load(sys.argv[1])
print(time.perf_counter() - begun)
"""


def write(config: ModelConfig, folder: Path) -> int:
    """A packed model without meaning; returns its bytes."""
    form = FORMATS["int4-g32"]
    with torch.device("meta"):
        model = Transformer(config, initialize=False)
    for path, group in slots(model).items():
        made = room(group, [form] * len(group))
        for weight in made.weights.values():
            weight.tiles.zero_()[..., -31::2] = 0x3C  # scales of 1
        install(model, path, [made])
    rest = {
        name: torch.ones(one.shape, dtype=torch.bfloat16)
        for name, one in model.state_dict().items()
        if one.is_meta
    }
    model.load_state_dict(rest, assign=True, strict=False)
    model.save(folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> int:
    """Five loads."""
    options = arguments(__doc__ or "")
    config = replace(OLMOE, layers=1) if options.quick else OLMOE
    with tempfile.TemporaryDirectory() as folder:
        size = write(config, Path(folder) / "m")
        command = [sys.executable, "-c", CHILD, str(Path(folder) / "m")]
        seconds = [
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(6)
        ][1:]
    median = statistics.median(seconds)
    row = Row(
        case=f"a packed model of {size / 1e9:.1f} GB is ready",
        ours=round(median, 3),
        peer=LIMIT_S,
        peer_name="limit",
        unit="s",
        ratio=round(LIMIT_S / median, 2),
        bar=1.0,
        met=median <= LIMIT_S,
        note=f"{min(seconds):.2f} to {max(seconds):.2f} s",
    )
    return finish("packed_load", [row])


if __name__ == "__main__":
    sys.exit(main())

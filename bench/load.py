"""Time and memory of loading a checkpoint from a warm page cache, against transformers.

A random model of Mixtral's build in bfloat16, about 2 GB in shards of 500 MB (--quick: 200 MB in shards of 50 MB).
Each load is a process of its own, ours and theirs in turn, warmed up on a small model. All their bits
must add up to the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _harness import Row, arguments, compare, finish

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.model.checkpoint import save
from moiety.model.transformer import Transformer
from moiety.storage import MANIFEST

LARGE = ModelConfig(
    vocab_size=32_000,
    d_model=1024,
    layers=10,
    attention=AttentionConfig(heads=16, kv_heads=4, head_dim=64),
    d_ff=3584,
    moe=MoEConfig(experts=8, experts_per_token=2, d_ff=3584),
)
QUICK = replace(LARGE, vocab_size=8000, layers=1)
SMALL = replace(
    LARGE, vocab_size=50, layers=1, d_model=64, moe=MoEConfig(experts=2, experts_per_token=1, d_ff=64)
)
CHILD = Path(__file__).with_name("_load_child.py")
Results = dict[str, list[dict[str, Any]]]


def write(folder: Path, config: ModelConfig, shard_bytes: int) -> int:
    """Write a random model as a download would be, without our manifest; returns its largest file's bytes."""
    with torch.device("meta"):
        model = Transformer(config, initialize=False)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    save(model, folder, max_shard_bytes=shard_bytes)
    (folder / MANIFEST).unlink()
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(small: Path, large: Path, rounds: int) -> Results:
    """Both methods in turn, each time in a new process; the files were just written, so they are in memory."""
    results: Results = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for method, seen in results.items():
            command = [sys.executable, str(CHILD), method, str(small), str(large)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seen.append(json.loads(done.stdout.splitlines()[-1]))
    bits = {one["bits"] for seen in results.values() for one in seen}
    assert len(bits) == 1, f"the two models differ: {bits}"
    return results


def memory_rows(results: Results, shard_bytes: int, case: str) -> list[Row]:
    """Peak memory above what was there before, against model and one shard, and against transformers."""
    peaks = {name: max(one["peak"] for one in seen) for name, seen in results.items()}
    size = results["ours"][0]["size"]
    limits = {"model + one shard": (size + shard_bytes, 1.0), "transformers": (peaks["transformers"], None)}
    return [
        Row(
            case=f"{case}: peak memory against {name}",
            ours=round(peaks["ours"] / 1e6, 1),
            peer=round(limit / 1e6, 1),
            peer_name=name,
            unit="MB",
            ratio=round(limit / peaks["ours"], 3),
            bar=bar,
            met=None if bar is None else limit / peaks["ours"] >= bar,
            note=f"largest of {len(results['ours'])}; the model has {size / 1e6:.1f} MB; mapped pages count",
        )
        for name, (limit, bar) in limits.items()
    ]


def main() -> int:
    """2 GB, or with --quick 200 MB."""
    options = arguments(__doc__ or "")
    torch.manual_seed(0)
    config, shard_bytes, rounds = (QUICK, 50_000_000, 3) if options.quick else (LARGE, 500_000_000, 7)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        write(small, SMALL, shard_bytes)
        shard = write(large, config, shard_bytes)
        results = measure(small, large, rounds)
    case = f"load {results['ours'][0]['size'] / 1e9:.1f} GB"
    rows = [
        compare(
            said,
            {name: [one[key] for one in seen] for name, seen in results.items()},
            ours="ours",
            peers=["transformers"],
            bar=bar,
        )
        for said, key, bar in (
            (f"{case}: time", "seconds", 1.0),
            (f"{case}: time until every weight was read once", "used", None),
        )
    ]
    return finish("load", [*rows, *memory_rows(results, shard, case)])


if __name__ == "__main__":
    sys.exit(main())

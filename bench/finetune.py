"""A step of LoRA against PEFT on transformers, and of QLoRA against our own LoRA; and the memory that QLoRA takes.

A step is forward, loss, backward and AdamW on adapters in attention and in every routed expert, on random text that
is new at every step. Both sides have the same weights, ranks and targets; PEFT's adapters are those that we write, and
the first losses must be equal. Each side is a process of its own, ours with what `moiety finetune` sets, and they take
steps in turn. QLoRA is of OLMoE-1B-7B's shape with random weights: in memory whole, and in time beside bfloat16 LoRA of
as many of its layers as fit.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _finetune_child import OPTIONS, initialized
from _harness import Row, arguments, compare, finish
from torch import nn

from moiety.backends.matmul import has_products
from moiety.cli.torch_settings import LARGE_PAGES, TORCH_CACHE
from moiety.config import ModelConfig
from moiety.model import checkpoint
from moiety.model.adapter_files import family_at, save_adapter
from moiety.model.transformer import Transformer
from moiety.quant.pretend import shape_named
from moiety.train.lora import adapt
from moiety.train.model_options import ModelOptions

MODEL = ModelOptions(d_model=512, layers=4, heads=8, d_ff=512, experts=32, experts_per_token=4)
VOCABULARY, SEQUENCES, LENGTH = 4096, 4, 512
SHAPE, QLORA_TOKENS, MOST_GB = "olmoe-1b-7b", 1024, 6.0
AS_FINETUNE = {TORCH_CACHE: "64", LARGE_PAGES: "1"}  # what `cli/finetune.py` sets before torch is imported
WARM, LEAST, MOST = 10, 5, 15
FASTER, SLOWER = 2.0, 1.3


class Side:
    """One side of a comparison, a process that takes a step when it is told to."""

    def __init__(self, stack: contextlib.ExitStack, spec: Mapping[str, Any], **environment: str) -> None:
        script = Path(__file__).with_name("_finetune_child.py")
        self._child = subprocess.Popen(
            [sys.executable, str(script), json.dumps(spec)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(self._child.wait)
        stack.callback(self._child.kill)
        self.learning: int = self._said()["learning"]
        self.losses: list[float] = []
        self.peak = 0

    def _said(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            sys.exit("one side ended early; above is why")
        return json.loads(line)

    def step(self) -> float:
        """Seconds of the next step."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        said = self._said()
        self.losses.append(said["loss"])
        self.peak = said["peak"]
        seconds: float = said["seconds"]
        return seconds


def steps_in_turn(sides: Mapping[str, Side], seconds: float) -> dict[str, list[float]]:
    """Seconds of every step, the sides taking turns, after so many that libraries have met most numbers of rows."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(WARM):
        for side in sides.values():
            side.step()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST or (time.perf_counter() < end and rounds < MOST):
        for name, side in sides.items():
            times[name].append(side.step())
        rounds += 1
    return times


class Case(NamedTuple):
    """One comparison with PEFT; `ways` are those of transformers to multiply experts, of which the fastest counts."""

    name: str
    config: ModelConfig
    dtype: torch.dtype
    tokens: tuple[int, int]
    ways: tuple[str, ...]
    seconds: float


def lora_cases(quick: bool) -> list[Case]:
    """A small model in both dtypes, and layers of a real shape, whose experts one by one would take minutes a step.

    On a processor without products of 16 bits PEFT takes seconds a sequence of 128 in bfloat16: it gets one such.
    """
    both, tokens = ("eager", "grouped_mm"), (1, 256) if quick else (SEQUENCES, LENGTH)
    small = MODEL.config(VOCABULARY, LENGTH)
    if quick:
        return [Case("a small model", small, torch.float32, tokens, both, 8)]
    is_slow = not has_products(torch.bfloat16)
    large = torch.float32 if is_slow else torch.bfloat16
    return [
        Case("a small model", small, torch.float32, tokens, both, 60),
        Case("a small model", small, torch.bfloat16, (1, 128) if is_slow else tokens, both, 60),
        Case(f"2 layers of {SHAPE}", shape_named(SHAPE, 2), large, (2, 512), ("grouped_mm",), 60),
    ]


def lora_row(case: Case) -> Row:
    """Ours against PEFT: same weights, adapters, tokens and optimizer, float32 adapters on both sides."""
    size = str(case.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="moiety-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        save(case, folder)
        spec = {
            "folder": name,
            "dtype": size,
            "tokens": case.tokens,
            "vocabulary": case.config.vocab_size,
        }
        sides = {"ours": Side(stack, spec | {"side": "ours"}, **AS_FINETUNE)}
        for way in case.ways:
            sides[f"peft {way}"] = Side(stack, spec | {"side": "peft", "way": way})
        assert len({side.learning for side in sides.values()}) == 1, "other parameters learn"
        times = steps_in_turn(sides, case.seconds)
        for other, side in sides.items():
            pairs = zip(side.losses[:3], sides["ours"].losses[:3], strict=True)
            worst = max(abs(theirs - ours) for theirs, ours in pairs)
            assert worst < (1e-4 if case.dtype == torch.float32 else 2e-2), (other, worst)
    name = f"LoRA step, {case.name}, {size}, {case.tokens[0] * case.tokens[1]:,} tokens, rank {OPTIONS.rank}"
    return compare(name, times, ours="ours", peers=[*sides][1:], bar=FASTER)


def save(case: Case, folder: Path) -> None:
    """A random model, and a random adapter that does something."""
    torch.manual_seed(0)
    model = initialized(lambda: Transformer(case.config), case.dtype)
    checkpoint.save(model, folder / "base")
    adapt(model, OPTIONS)
    for own, one in model.named_parameters():
        if own.endswith(".b"):
            nn.init.normal_(one, std=0.01)
    save_adapter(model, folder / "adapter", family=family_at(folder / "base"))


def shape_spec(layers: int, form: str, tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Random weights of the shape, plain or packed, with adapters in attention and experts; 0 layers are all."""
    return {
        "side": "shape",
        "shape": SHAPE,
        "layers": layers,
        "format": form,
        "checkpointing": checkpointing,
        "dtype": "bfloat16",
        "tokens": (2, tokens // 2),
        "vocabulary": shape_named(SHAPE, layers).vocab_size,
    }


def memory_row() -> Row:
    """Peak of a process that does nothing but QLoRA of the whole shape, after four steps."""
    with contextlib.ExitStack() as stack:
        side = Side(stack, shape_spec(0, "nf4", QLORA_TOKENS, checkpointing=True), **AS_FINETUNE)
        for _ in range(4):
            side.step()
    gb = side.peak / 1e9
    return Row(
        case=f"QLoRA of {SHAPE}, nf4, rank {OPTIONS.rank}, {QLORA_TOKENS} tokens",
        ours=round(gb, 3),
        peer=MOST_GB,
        peer_name="bar",
        unit="GB peak RSS",
        ratio=round(MOST_GB / gb, 3),
        bar=1.0,
        met=gb <= MOST_GB,
        note=f"{side.learning:,} parameters trained",
    )


def qlora_row(quick: bool) -> Row:
    """QLoRA against bfloat16 LoRA of the same shape, tokens and ranks, with as many layers as fit."""
    layers, tokens = (1, 256) if quick else (4, QLORA_TOKENS)
    with contextlib.ExitStack() as stack:
        sides = {
            name: Side(stack, shape_spec(layers, form, tokens, checkpointing=False), **AS_FINETUNE)
            for name, form in (("ours", "nf4"), ("bf16 LoRA", ""))
        }
        times = steps_in_turn(sides, 8 if quick else 60)
    case = f"QLoRA step, {layers} layers of {SHAPE}, {tokens:,} tokens"
    return compare(case, times, ours="ours", peers=["bf16 LoRA"], bar=1 / SLOWER)


def main() -> int:
    """Print a table and one JSON line."""
    given: Any = arguments(__doc__ or "")
    rows = [lora_row(case) for case in lora_cases(given.quick)] + [qlora_row(given.quick)]
    if not given.quick:
        rows.append(memory_row())
    return finish("finetune", rows)


if __name__ == "__main__":
    sys.exit(main())

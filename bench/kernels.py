"""The packed kernels alone, against what the machine can do: memory read once, and multiplications in registers.

One row per expert is reading weights; many rows per expert is multiplying. Both limits are measured in turn with the
kernels, on the same weights. Layers are taken in turn so that no weight is left in a cache.
"""

from __future__ import annotations

import itertools
import statistics
import sys

import torch
from _harness import Row, arguments, finish, time_in_turn

from moiety.backends import cpu
from moiety.backends.cpu_limits import multiply_rate, read_all
from moiety.formats import format_named
from moiety.formats.tiles import pack
from moiety.routing import Routing

SHAPES = {"OLMoE-1B-7B": (64, 2048, 1024, 8), "Qwen3-30B-A3B": (128, 2048, 768, 8)}  # E, D, F, K
FORMATS = ("int4-g32", "int4-g64", "int4-g128", "int8", "mxfp4", "nf4-g64", "bf16")
READ_BAR, PEAK_BAR = 0.9, 0.5


def layer_of(experts: int, d_model: int, d_ff: int, name: str) -> cpu.PackedExpertWeights:
    """Random experts; one matrix packed and repeated, because packing takes longer than measuring."""
    form = format_named(name)

    def matrix(rows: int, columns: int, interleaved: bool) -> cpu.Matrix:
        one = pack(torch.randn(1, rows, columns) * 0.02, form, interleaved=interleaved)
        tiles = one.tiles.expand(experts, -1, -1, -1).contiguous()
        return cpu.Matrix(type(one)(**{**vars(one), "experts": experts, "tiles": tiles}))

    return cpu.PackedExpertWeights(up=matrix(2 * d_ff, d_model, True), down=matrix(d_model, d_ff, False))


def one_row(shape: str, name: str, seconds: float) -> Row:
    """One token: K experts, one row each. Each call takes other experts."""
    experts, d_model, d_ff, k = SHAPES[shape]
    weights = layer_of(experts, d_model, d_ff, name)
    x = torch.randn(1, d_model)
    picks = [sorted(torch.randperm(experts)[:k].tolist()) for _ in range(64)]
    routings = [
        Routing.from_pairs(
            torch.zeros(k, dtype=torch.int64), torch.tensor(pick), torch.ones(k), tokens=1, experts=experts
        )
        for pick in picks
    ]
    parts = [[m.weight.tiles[e] for m in (weights.up, weights.down) for e in pick] for pick in picks]
    turns, reads = itertools.cycle(routings), itertools.cycle(parts[32:] + parts[:32])
    times = time_in_turn(
        {"kernel": lambda: cpu.expert_mlp(x, next(turns), weights), "read": lambda: read_all(next(reads))},
        seconds=seconds,
        least=32,
        most=1000,
    )
    size = sum(part.numel() for part in parts[0])
    ours, peer = (size / statistics.median(times[method]) / 1e9 for method in ("kernel", "read"))
    ratio = ours / peer
    return Row(
        case=f"{shape}, {name}: 1 row per expert",
        ours=round(ours, 2),
        peer=round(peer, 2),
        peer_name="memory read",
        unit="GB/s",
        ratio=round(ratio, 3),
        bar=READ_BAR if name.startswith(("int4", "int8")) else None,
        met=ratio >= READ_BAR if name.startswith(("int4", "int8")) else None,
        note=f"n={len(times['kernel'])}",
    )


def many_rows(shape: str, name: str, rows: int, seconds: float) -> Row:
    """`rows` rows for each expert."""
    experts, d_model, d_ff, k = SHAPES[shape]
    weights = layer_of(experts, d_model, d_ff, name)
    tokens = experts * rows // k
    chosen = torch.arange(tokens * k).view(tokens, k) % experts
    routing = Routing.from_mask(torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True))
    x = torch.randn(tokens, d_model)
    integers = name.startswith(("int", "mxfp4"))
    peaks: list[float] = []
    times = time_in_turn(
        {
            "kernel": lambda: cpu.expert_mlp(x, routing, weights),
            "peak": lambda: peaks.append(multiply_rate(integers=integers)),
        },
        seconds=seconds,
        least=5,
        most=50,
    )
    operations = 6 * tokens * k * d_model * d_ff
    ours, peer = operations / statistics.median(times["kernel"]) / 1e12, statistics.median(peaks) / 1e12
    bar = PEAK_BAR if rows >= 64 and integers else None
    return Row(
        case=f"{shape}, {name}: {rows} rows per expert",
        ours=round(ours, 3),
        peer=round(peer, 3),
        peer_name="peak in registers",
        unit="TOP/s",
        ratio=round(ours / peer, 3),
        bar=bar,
        met=None if bar is None else ours / peer >= bar,
        note=f"{cpu.level()}, n={len(times['kernel'])}",
    )


def main() -> int:
    """Every format at one row, at 4 and at 64."""
    options = arguments(__doc__ or "")
    if options.device != "cpu" or not cpu.levels():
        print("this measures the compiled CPU kernels", file=sys.stderr)
        return finish("kernels", [])
    seconds = 1.0 if options.quick else 1.5
    shapes = list(SHAPES)[:1] if options.quick else list(SHAPES)
    formats = FORMATS[:1] if options.quick else FORMATS
    rows = [one_row(shape, name, seconds) for shape in shapes for name in formats]
    rows += [
        many_rows(shape, name, count, seconds)
        for shape in shapes
        for name in formats
        for count in ((64,) if options.quick else (4, 64))
    ]
    return finish("kernels", rows)


if __name__ == "__main__":
    sys.exit(main())

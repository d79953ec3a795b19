"""What an all-to-all between processes of this machine takes, and whether latency + bytes / rate foretells it.

Processes exchange equal parts with `all_to_all_single` over gloo. All their messages pass the same cores and memory, so
the model counts messages and bytes of all of them together: ranks x (ranks - 1) messages, ranks x (bytes that each
sends to others). `fit` (`moiety/plan/links.py`) takes every other size of a number of ranks and foretells the sizes in
between; what it finds for two ranks foretells four as well. An exchange takes the first quartile of its times at the
rank that waited longest: other programs only add to it. A row's `ours` is foretold, its peer measured; the errors
of sizes that were fitted and of those that were not stand apart in the JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from _harness import Row, arguments, finish

from moiety.plan.links import Link, Sample, fit

RANKS = (2, 4)
SIZES = tuple(4**power << 10 for power in range(1, 8))  # bytes of a rank's whole buffer: 4 KiB to 16 MiB
SECONDS = {False: 1.5, True: 0.25}  # of each size
TURNS = 8  # that sizes take, so that a busy moment of the machine is not one size's


def _rank(rank: int, ranks: int, sizes: tuple[int, ...], seconds: float, folder: str) -> None:
    """One process: every size in turn, and the seconds of each exchange at the rank that waited longest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    buffers = [torch.full((size // 4,), float(rank)) for size in sizes]
    answers = [torch.empty_like(one) for one in buffers]
    rounds = torch.tensor([_rounds(out, back, seconds) for out, back in zip(buffers, answers, strict=True)])
    dist.broadcast(rounds, 0)
    found: list[list[float]] = [[] for _ in sizes]
    for _ in range(TURNS):
        for out, back, count, times in zip(buffers, answers, rounds.tolist(), found, strict=True):
            for _ in range(count):
                dist.barrier()
                begun = time.perf_counter()
                dist.all_to_all_single(back, out)
                times.append(time.perf_counter() - begun)
            assert back.view(ranks, -1)[:, 0].tolist() == list(range(ranks)), back
    slowest = [torch.tensor(times, dtype=torch.float64) for times in found]
    for times_N in slowest:
        dist.all_reduce(times_N, dist.ReduceOp.MAX)
    if rank == 0:
        (Path(folder) / "times").write_text(json.dumps([times_N.tolist() for times_N in slowest]))
    dist.destroy_process_group()


def _rounds(out: torch.Tensor, back: torch.Tensor, seconds: float) -> int:
    """How many exchanges a turn has, by the fourth one."""
    for _ in range(3):
        dist.all_to_all_single(back, out)
    begun = time.perf_counter()
    dist.all_to_all_single(back, out)
    return max(2, min(50, int(seconds / TURNS / (time.perf_counter() - begun))))


def measured(ranks: int, seconds: float) -> list[list[float]]:
    """Seconds of every exchange of every size."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (ranks, SIZES, seconds, folder), nprocs=ranks)
        times: list[list[float]] = json.loads((Path(folder) / "times").read_text())
    return times


def sample(ranks: int, size: int, seconds: float) -> Sample:
    """An exchange as the model counts it."""
    return Sample(ranks * (ranks - 1), ranks * size * (1 - 1 / ranks), seconds)


def error(link: Link, one: Sample) -> float:
    """Foretold over measured, less one."""
    return link.seconds(one.size_bytes, one.messages) / one.seconds - 1


def summary(link: Link, samples: list[Sample]) -> dict[str, float]:
    """Mean and largest error, without sign."""
    errors = [abs(error(link, one)) for one in samples]
    return {
        "mean": round(statistics.fmean(errors), 3),
        "largest": round(max(errors), 3),
        "sizes": len(errors),
    }


def main() -> int:
    """Measure, fit, foretell."""
    options = arguments(__doc__ or "")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rows: list[Row] = []
    errors: dict[str, dict[str, float]] = {}
    links: dict[str, dict[str, float]] = {}
    first: Link | None = None
    for ranks in RANKS:
        times = measured(ranks, SECONDS[options.quick])
        samples = [
            sample(ranks, size, statistics.quantiles(one, n=4)[0])
            for size, one in zip(SIZES, times, strict=True)
        ]
        link = fit(samples[::2])
        links[str(ranks)] = {"latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s}
        errors[f"{ranks} ranks, fitted"] = summary(link, samples[::2])
        errors[f"{ranks} ranks, sizes not fitted"] = summary(link, samples[1::2])
        if first is not None:
            errors[f"{ranks} ranks, by the fit of {RANKS[0]}"] = summary(first, samples)
        first = first or link
        for number, (size, one, each) in enumerate(zip(SIZES, samples, times, strict=True)):
            foretold = link.seconds(one.size_bytes, one.messages)
            quarters = statistics.quantiles(each, n=4)
            rows.append(
                Row(
                    case=f"{ranks} ranks, {size >> 10} KiB each, {'not ' * (number % 2)}fitted",
                    ours=round(1e3 * foretold, 4),
                    peer=round(1e3 * one.seconds, 4),
                    peer_name="measured",
                    unit="ms",
                    ratio=round(one.seconds / foretold, 3),
                    bar=None,
                    met=None,
                    note=f"quartiles {1e3 * quarters[0]:.3f}..{1e3 * quarters[2]:.3f} (n={len(each)})",
                )
            )
    return finish("alltoall", rows, links=links, errors=errors)


if __name__ == "__main__":
    sys.exit(main())

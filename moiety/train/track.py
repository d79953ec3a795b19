"""Where the numbers of a run go: one JSON line per step, and tensorboard, wandb or trackio if asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moiety.errors import UsageError
from moiety.packages import need
from moiety.storage import write_atomically
from moiety.train.loop import StepRecord

__all__ = ["TRACKERS", "JsonLines", "Tracker", "check_trackers", "open_trackers", "values_of"]


class Tracker(Protocol):
    """Takes the numbers of each step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of one step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


def values_of(record: StepRecord) -> dict[str, float]:
    """A record as flat names and numbers; what is not finite is left out, never written."""
    values: dict[str, float | None] = {
        "loss": record.loss,
        "balance_loss": record.balance_loss,
        "z_loss": record.z_loss,
        "gradient_norm": record.gradient_norm,
        "learning_rate": record.learning_rate,
        "skipped_steps": record.state.skipped_steps,
        "tokens_seen": record.state.tokens_seen,
        "step_seconds": record.step_seconds,
    }
    for layer, health in record.health.items():
        values |= {f"layer_{layer}/{name}": value for name, value in health.numbers().items()}
    if record.evaluation is not None:
        values["bits_per_byte/mean"] = record.evaluation.mean_bits_per_byte
        for domain, bits in record.evaluation.bits_per_byte.items():
            values[f"bits_per_byte/{domain}"] = bits
        values |= {f"held_out_loss/{domain}": loss for domain, loss in record.evaluation.losses.items()}
        values |= {f"preferred/{domain}": share for domain, share in record.evaluation.preferred.items()}
    return {
        name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)
    }


class JsonLines:
    """One JSON object per step in a file. On resume, lines after the resumed step are cut off.

    Args:
        path: The file.
        after_step: Keep lines up to this step.
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        kept = b""
        if path.exists() and after_step:
            lines = path.read_bytes().splitlines(keepends=True)
            kept = b"".join(line for line in lines if line.endswith(b"\n") and _step_of(line) <= after_step)
        write_atomically(path, kept)
        self.file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _step_of(line: bytes) -> float:
    """The step of a line; a line cut short by a crash counts as past every step."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return float(step)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        module = need("torch.utils.tensorboard", "tracking", "moiety[track]")
        self.writer: Any = module.SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    """wandb, and trackio, which has the same three calls."""

    def __init__(self, package: str, folder: Path) -> None:
        self.module: Any = need(package, "tracking", "moiety[track]")
        self.module.init(project="moiety", name=folder.name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


TRACKERS = ("tensorboard", "wandb", "trackio")


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker that does not exist."""
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise UsageError(f"there is no tracker {unknown[0]!r}", hint=f"there are {', '.join(TRACKERS)}")


def open_trackers(names: Sequence[str], folder: Path, *, after_step: int = 0) -> list[Tracker]:
    """`metrics.jsonl` in the run's folder, and each tracker in `names`.

    Raises:
        UsageError: an unknown name.
        DependencyError: the package is not installed.
    """
    check_trackers(names)
    others: list[Tracker] = [
        _TensorBoard(folder) if name == "tensorboard" else _WandbLike(name, folder) for name in names
    ]
    return [JsonLines(folder / "metrics.jsonl", after_step=after_step), *others]

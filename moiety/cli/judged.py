"""A run against its plan: one line on stderr, and one in the history of this machine's profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from moiety.cli.output import talk
from moiety.config import ModelConfig
from moiety.errors import UsageError
from moiety.plan.plan import UNMEASURED, here
from moiety.plan.profile import append_history, default_path, read_profile
from moiety.plan.speed import Machine
from moiety.plan.verdict import entry, expected, judge, sentence
from moiety.plan.weights import Stored

__all__ = ["begin", "judge_run"]


def begin(plan: bool, *, allowed: bool = True) -> None:
    """Before a model is loaded: memory that is freed goes back, so that what is resident is what is in use.

    Raises:
        UsageError: a plan is asked for where it cannot be judged.
    """
    if plan and not allowed:
        raise UsageError("--plan judges one answer of the engine", hint="one prompt, without --plain and --n")
    if plan:
        from moiety.train.host import give_back_freed_memory

        give_back_freed_memory()


def judge_run(
    name: str,
    config: ModelConfig,
    stored: Stored,
    measured: Mapping[str, float],
    *,
    batches: Mapping[int, int],
    prompts: Sequence[int],
    kv_dtype: str = "auto",
    resident: float = 1.0,
    mapped: bool = False,
) -> None:
    """Say what was planned beside what was measured.

    Args:
        name: Of the model, as the user says.
        config: The model's.
        stored: Its weights.
        measured: Figures by the names of `verdict.expected`.
        batches: As of it.
        prompts: As of it.
        kv_dtype: As of `EngineOptions`.
        resident: As of it.
        mapped: As of it.

    Raises:
        FormatError: this machine's profile is damaged.
        StorageError: its history cannot be written.
    """
    place = default_path()
    profile = read_profile(place) if place.is_file() else None
    if kv_dtype == "auto":
        kept = next(part.form for part in stored.parts if part.kind == "embedding")
        kv_dtype = "fp32" if kept == "fp32" else "bf16"
    machine = Machine(device=here(profile), profile=profile)
    how = {
        "batches": batches,
        "prompts": prompts,
        "kv_dtype": kv_dtype,
        "resident": resident,
        "mapped": mapped,
    }
    verdicts = judge(expected(config, stored, machine, **how), measured)  # type: ignore[arg-type]
    console = talk()
    console.print(sentence(verdicts))
    if profile is None:
        console.print(UNMEASURED)
        return
    case = {"model": name, "format": stored.form, "kv_dtype": kv_dtype, "resident": resident}
    append_history(entry(case, verdicts, datetime.now(UTC).strftime("%Y-%m-%d %H:%M")), place)

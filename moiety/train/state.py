"""Everything a run needs to go on bit for bit: weights, moments, random numbers, counters.

    run_folder/checkpoints/step-00001234/
        config.json, model.safetensors, tokenizer.json, ...    a model like any other
        state/optimizer.safetensors                            moments by parameter name, as they are
        state/moments/                                         the same in the parts of several processes (`sharded`)
        state/rng.json, state/state.json                       random numbers; counters and options
        state/learnt.safetensors, adapter/                     of a model with adapters, instead of the model: what
                                                               learns, as it is; and the same as PEFT reads it
        manifest.json                                          over all of it

Which checkpoint is the latest is worked out from what is whole on disk and never written down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moiety import storage
from moiety.errors import FormatError, UsageError
from moiety.model import checkpoint
from moiety.model.adapter_files import save_adapter
from moiety.model.adapters import names
from moiety.model.checkpoint import Entry
from moiety.model.parts import hollow
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.parallel.mesh import World

__all__ = ["Latest", "RunState", "latest_checkpoint", "load_state", "read_state", "save_checkpoint"]

STEP = re.compile(r"step-(\d{8,})")
ADAPTER, LEARNT = "adapter", "state/learnt.safetensors"
MOMENTS = "state/moments"  # of several processes; of one OPTIMIZER
OPTIMIZER, RANDOM, STATE = "state/optimizer.safetensors", "state/rng.json", "state/state.json"
GROUP_LISTS = ("params", "names")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run has come.

    Args:
        step: Steps done, skipped ones included.
        sequences_seen: Place in the training data.
        tokens_seen: Tokens trained on.
        skipped_steps: Steps without an update because something was not finite.
        consecutive_skips: How many of the last steps were such.
        seconds: Time spent in steps, over all sittings.
        sparsity: Coefficient of the sparsity loss, where a router's sparsity is steered.
        best_evaluation: JSON values about the best evaluation so far.
        last_evaluation: JSON values about the last one.
        run: The options of the run, as JSON values.
    """

    step: int = 0
    sequences_seen: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    seconds: float = 0.0
    sparsity: float = 1e-8
    best_evaluation: Mapping[str, Any] | None = None
    last_evaluation: Mapping[str, Any] | None = None
    run: Mapping[str, Any] = field(default_factory=dict)


class Latest(NamedTuple):
    """The newest whole checkpoint, and a line about each newer one that is not whole."""

    path: Path | None
    damaged: tuple[str, ...]


def save_checkpoint(
    run_folder: str | Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    *,
    tokenizer: Tokenizer | None = None,
    keep_last: int = 2,
    world: World | None = None,
) -> Path:
    """Write `run_folder/checkpoints/step-...`, then remove old checkpoints.

    Nothing is removed before the new one is safe on disk. Checkpoints of later steps, and folders with files
    that are not ours, always stay. A checkpoint of this very step whose manifest is damaged is given another
    name, `step-....damaged-...`.

    Args:
        run_folder: Of this run.
        model: Its weights, as they are.
        optimizer: Each group has `names`, its parameters' names in order.
        state: Counters and options.
        tokenizer: Written beside the weights.
        keep_last: Checkpoints to keep, the new one included; at least 1.
        world: The processes that have the model between them; all of them call this.

    Raises:
        StorageError: the system refused; every older checkpoint is still there.
        UsageError: keep_last is not positive, or a value in `state` is not JSON.
    """
    if keep_last < 1:
        raise UsageError(
            f"keep_last is {keep_last}; it must be at least 1", hint="1 keeps the newest checkpoint only"
        )
    world = world or World()
    parent = Path(run_folder) / "checkpoints"
    path = parent / f"step-{state.step:08}"
    moments = _moments(optimizer)
    learnt = _learnt(model) if names(model) else {}
    with _new_folder(path, _needed_bytes(model, moments, learnt, world), world) as folder:
        if learnt:
            checkpoint.write_tensors(folder / LEARNT, learnt)
            save_adapter(model, folder / ADAPTER)
        if world.mesh is not None:
            from moiety.train import sharded  # what it imports takes 50 MiB

            sharded.write(folder, model, moments, world, tokenizer)
        else:
            if not learnt:
                checkpoint.write_model(folder, model, tokenizer=tokenizer)
            entries = {key: Entry(tuple(one.shape), one.dtype, one.detach) for key, one in moments.items()}
            checkpoint.write_tensors(folder / OPTIMIZER, entries)
        with world.together():
            if world.leads:
                _write(folder / RANDOM, _random_state())
                _write(folder / STATE, {"state": dataclasses.asdict(state), "groups": _groups(optimizer)})
    if world.leads:
        _remove_older(parent, state.step, keep_last - 1)
    return path


def _remove_older(parent: Path, step: int, keep: int) -> None:
    older = sorted(one for one in _steps(parent) if one[0] < step)
    for _, name in older[: max(len(older) - keep, 0)]:
        if _has_readable_manifest(parent / name) and not storage.foreign_files(parent / name):
            storage.remove_folder(parent / name)


@contextlib.contextmanager
def _new_folder(path: Path, needed_bytes: int, world: World) -> Iterator[Path]:
    """`storage.new_folder` with `state/` in it, made and sealed by the leader and filled by all processes."""
    with contextlib.ExitStack() as stack:
        place = path
        with world.together():
            if world.leads:
                if storage.has_manifest(path) and not _has_readable_manifest(path):
                    storage.set_aside(path)  # a damaged one must not stop the run that got back to its step
                place = stack.enter_context(storage.new_folder(path, needed_bytes=needed_bytes))
                (place / "state").mkdir()
        yield Path(world.told(str(place)))
        with world.together():
            stack.close()


def _needed_bytes(
    model: Transformer, moments: Mapping[str, torch.Tensor], learnt: Mapping[str, Entry], world: World
) -> int:
    """Bytes of a checkpoint; with several processes a model's and twice as much."""
    if world.mesh is not None:
        return 3 * checkpoint.size_bytes(hollow(model.config)) + (1 << 17)
    own_bytes = 2 * sum(one.size_bytes for one in learnt.values()) or checkpoint.size_bytes(model)
    return own_bytes + sum(one.nbytes for one in moments.values()) + (1 << 17)


def latest_checkpoint(run_folder: str | Path) -> Latest:
    """The checkpoint of the highest step that is whole, file by file.

    Returns:
        Its path, or None when there is none, and what is wrong with each newer one: say it to the user.

    Raises:
        StorageError: the system refused to read.
    """
    parent = Path(run_folder) / "checkpoints"
    damaged = []
    for _, name in sorted(_steps(parent), reverse=True):
        path = storage.existing(parent / name)
        try:
            storage.verify(path)
        except FormatError as error:
            damaged.append(f"{name} was passed over: {error.message}")
        else:
            return Latest(path, tuple(damaged))
    return Latest(None, tuple(damaged))


def load_state(
    path: str | Path, model: Transformer, optimizer: torch.optim.Optimizer, world: World | None = None
) -> RunState:
    """Put a run back to where it was: weights, moments, group options, random numbers.

    Args:
        path: A checkpoint of `save_checkpoint`.
        model: Of the same config and dtype; overwritten.
        optimizer: Over the same parameters in the same groups; overwritten.
        world: The processes that have the model between them, however many wrote the checkpoint.

    Raises:
        FormatError: damaged, or not of a run.
        StorageError: the system refused to read.
        UsageError: of another model, or the optimizer's groups are others.
    """
    world, folder = world or World(), storage.existing(path)
    _require_manifest(folder)
    if names(model):
        storage.verify(folder)
        _restore_learnt(folder, model)
    else:
        put = None if world.mesh is None else world.put
        checkpoint.load_weights(folder, model, put)  # verifies every file against the manifest first
    state, groups = _read(folder)
    numbers = storage.read_json(storage.inside(folder, RANDOM))
    saved = [group["names"] for group in groups]
    here = [list(group["names"]) for group in optimizer.param_groups]
    if saved != here:
        differing = sorted({str(names) for names in saved} ^ {str(names) for names in here})
        raise UsageError(
            f"{folder} has optimizer groups of other parameters: {'; '.join(differing)[:400]}",
            hint="make the optimizer as the run did",
        )
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for key, value in values.items():
            if key not in GROUP_LISTS:
                group[key] = tuple(value) if isinstance(value, list) else value
    _restore_moments(folder, optimizer, world)
    _restore_random(folder, numbers)
    return state


def read_state(path: str | Path) -> RunState:
    """The counters and options of a checkpoint, without loading it.

    Raises:
        FormatError: damaged, or not of a run.
    """
    folder = storage.existing(path)
    _require_manifest(folder)
    return _read(folder)[0]


def _require_manifest(folder: Path) -> None:
    if not storage.has_manifest(folder) or not (folder / STATE).exists():
        raise FormatError(
            f"{folder} is not a checkpoint of a run: it has no manifest or no {STATE}",
            hint="load it as a model, or give a folder under checkpoints/",
        )


def _steps(parent: Path) -> list[tuple[int, str]]:
    """Step and name of every checkpoint folder."""
    return [(int(match[1]), name) for name in storage.folder_names(parent) if (match := STEP.fullmatch(name))]


def _has_readable_manifest(path: Path) -> bool:
    """False where what belongs to a folder cannot be told."""
    try:
        storage.foreign_files(path)
    except FormatError:
        return False
    return True


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Names and options of the groups, as JSON values."""
    groups = []
    for group in optimizer.param_groups:
        assert len(group["names"]) == len(group["params"]), (group["names"], len(group["params"]))
        groups.append({key: value for key, value in group.items() if key != "params"})
    return groups


def _named(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's state as `parameter:kind`."""
    moments = {}
    for name, parameter in _named(optimizer).items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, torch.Tensor), (name, kind, value)
            moments[f"{name}:{kind}"] = value
    return moments


def _restore_moments(folder: Path, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Put moments back as they were; `Optimizer.load_state_dict` would cast them to the parameters' dtype."""
    named = _named(optimizer)
    found: dict[str, dict[str, torch.Tensor]] = {}
    if (folder / MOMENTS).exists():
        from moiety.train import sharded

        stored = sharded.read_moments(folder, named, world)
    else:
        stored = checkpoint.read_tensors(storage.inside(folder, OPTIMIZER))
        stored = {key: _part(key, whole, named, world) for key, whole in stored.items()}
    for key, value in stored.items():
        name, _, kind = key.rpartition(":")
        parameter = named.get(name)
        if parameter is None or (value.dim() and value.shape != parameter.shape):
            raise FormatError(
                f"{folder / OPTIMIZER} has {key} of shape {tuple(value.shape)}, which fits nothing"
            )
        found.setdefault(name, {})[kind] = value if kind == "step" else value.to(parameter.device)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in found:
                kinds = found[name]
                if on_device and "step" in kinds:
                    kinds["step"] = kinds["step"].to(parameter.device)
                optimizer.state[parameter] = kinds


def _part(
    key: str, whole: torch.Tensor, parameters: Mapping[str, torch.Tensor], world: World
) -> torch.Tensor:
    """This process's part of one moment of a checkpoint that one process wrote."""
    name = key.rpartition(":")[0]
    if world.mesh is None or name not in parameters or whole.dim() == 0:
        return whole
    if world.cut(name, whole).shape != parameters[name].shape:
        return whole  # the caller says what does not fit
    moment = torch.zeros_like(parameters[name].detach(), dtype=whole.dtype)
    world.put(name, moment, whole)
    return moment


def _learnt(model: Transformer) -> dict[str, Entry]:
    """What of a model with adapters learns, and the selection biases of its routers, by our names."""
    found = {
        **{name: one for name, one in model.named_parameters() if one.requires_grad},
        **{name: one for name, one in model.named_buffers() if name.endswith("selection_bias")},
    }
    return {name: Entry(tuple(one.shape), one.dtype, one.detach) for name, one in found.items()}


def _restore_learnt(folder: Path, model: Transformer) -> None:
    here, stored = _learnt(model), checkpoint.read_tensors(storage.inside(folder, LEARNT))
    wrong = [name for name, one in here.items() if name in stored and stored[name].shape != one.shape]
    if here.keys() != stored.keys() or wrong:
        differing = sorted((here.keys() ^ stored.keys()) | set(wrong))
        raise UsageError(
            f"{folder} has other adapters than the model: {', '.join(differing)[:400]}",
            hint="adapt the model as the run did",
        )
    for name, one in here.items():
        one.fetch().copy_(stored[name])


def _random_state() -> dict[str, Any]:
    """The generators of torch (with its devices), numpy and Python."""
    version, internal, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict), type(legacy)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _hexadecimal(torch.get_rng_state()),
        "cuda": [_hexadecimal(one) for one in devices],
        "numpy": {
            "key": legacy["state"]["key"].tolist(),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "python": [version, list(internal), gauss],
    }


def _restore_random(folder: Path, numbers: Mapping[str, Any]) -> None:
    try:
        version, internal, gauss = numbers["python"]
        legacy = numbers["numpy"]
        torch.set_rng_state(_from_hexadecimal(numbers["torch"]))
        if torch.cuda.is_available() and len(numbers["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([_from_hexadecimal(one) for one in numbers["cuda"]])
        random.setstate((version, tuple(internal), gauss))
        key = np.array(legacy["key"], np.uint32)
        np.random.set_state(("MT19937", key, legacy["pos"], legacy["has_gauss"], legacy["gauss"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{folder / RANDOM} holds no state of random numbers: {error}") from error


def _hexadecimal(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hexadecimal(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _write(file: Path, values: Mapping[str, Any]) -> None:
    """JSON in which NaN is allowed: an evaluation may have ended in it, and a checkpoint must not fail for it."""
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file.name} cannot hold these values: {error}", hint="give JSON values") from error
    with open(file, "x", encoding="utf-8") as opened:
        opened.write(text)


def _read(folder: Path) -> tuple[RunState, list[dict[str, Any]]]:
    file = storage.inside(folder, STATE)
    values = storage.read_json(file, finite=False)
    said, groups = values.get("state"), values.get("groups")
    names = {item.name for item in dataclasses.fields(RunState)}
    if not isinstance(said, dict) or set(said) != names or not isinstance(groups, list):
        raise FormatError(
            f"{file} is not the state of a run", hint="it is of another version of this program"
        )
    return RunState(**said), groups

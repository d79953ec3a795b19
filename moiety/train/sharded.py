"""Checkpoints of several processes: the model whole, as any other; the moments where each process has them.

    state/moments/shard-...safetensors     each process's parts of the moments, by torch's distributed checkpoint

The files are safetensors that say of each part where it belongs, so any number of processes can read them, one too, and
nothing is unpickled. Moments of what tensor parallelism cuts into blocks are put together first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard

from moiety.errors import FormatError, TrainingError
from moiety.model import checkpoint
from moiety.model.parts import hollow
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.parallel.mesh import Layout, World, local
from moiety.train.state import MOMENTS

__all__ = ["read_moments", "write"]


def write(
    folder: Path, model: Transformer, moments: Mapping[str, Tensor], world: World, tokenizer: Tokenizer | None
) -> None:
    """A model whole, and the moments in the parts that the processes have."""
    _write_model(folder, model, world, tokenizer)
    _write_moments(folder, moments, world)


def _write_model(folder: Path, model: Transformer, world: World, tokenizer: Tokenizer | None) -> None:
    """The leader writes the whole model, a tensor at a time, which the others hold out to it."""
    state = {name: one.detach() for name, one in model.state_dict().items()}
    with world.together(), world.lender(state) as whole:
        if whole is not None:
            shapes = hollow(model.config, {name: one.dtype for name, one in state.items()})
            checkpoint.write_model(
                folder,
                shapes,
                tokenizer=tokenizer,
                fetch=lambda name, expert: whole(name) if expert is None else whole(name)[expert],
            )


def _write_moments(folder: Path, moments: Mapping[str, Tensor], world: World) -> None:
    """Every process writes its parts of the moments, named `parameter:kind`."""
    with world.together():
        placed = {key: _placed(key, value, world) for key, value in moments.items()}
        writer = HuggingFaceStorageWriter(str(folder / MOMENTS), save_distributed=True)
        try:
            save({key: _flat(value) for key, value in placed.items()}, storage_writer=writer)
        except CheckpointException as error:
            raise TrainingError(
                f"the moments could not be saved: {_first(error)}",
                hint="all processes must see the run's folder, with room for it",
            ) from error


def read_moments(folder: Path, parameters: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """This process's parts of the moments that any number of processes wrote.

    Args:
        folder: A checkpoint.
        parameters: This process's parts of what is trained, by name.
        world: The processes that have the model between them now.

    Raises:
        FormatError: something is missing, or of another shape.
    """
    reader = HuggingFaceStorageReader(str(folder / MOMENTS))
    moments, placed = dict[str, Tensor](), dict[str, Tensor]()
    for key, found in reader.read_metadata().state_dict_metadata.items():
        name, _, kind = key.rpartition(":")
        if name not in parameters or not isinstance(found, TensorStorageMetadata):
            raise FormatError(f"{folder / MOMENTS} has {key}, which fits nothing")
        like, dtype = parameters[name].detach(), found.properties.dtype
        moments[key] = torch.zeros((), dtype=dtype) if kind == "step" else torch.zeros_like(like, dtype=dtype)
        placed[key] = _placed(key, moments[key], world)
        if tuple(_flat(placed[key]).shape) != tuple(found.size):
            raise FormatError(
                f"{folder / MOMENTS} has {key} of shape {tuple(found.size)}, by the model it is "
                f"{tuple(placed[key].shape)}",
                hint="shards are missing, or the checkpoint is of another model",
            )
    try:
        wanted = {key: _flat(value) for key, value in placed.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            load(wanted, storage_reader=reader, no_dist=world.mesh is None)
    except CheckpointException as error:
        raise FormatError(f"{folder / MOMENTS} cannot be read: {_first(error)}") from error
    for key, value in moments.items():
        if value.dim() and _layout(key, world).along == "tensor":
            world.put(key.rpartition(":")[0], value, placed[key])
    return moments


def _layout(key: str, world: World) -> Layout:
    return world.layouts.get(key.rpartition(":")[0], Layout())


def _flat(value: Tensor) -> Tensor:
    """A number as a tensor that can be cut, in the same memory."""
    return value.view(1) if value.dim() == 0 else value


def _placed(key: str, value: Tensor, world: World) -> Tensor:
    """A part that knows its place in the whole; of what is cut into blocks the whole."""
    along = _layout(key, world).along if value.dim() else ""
    if along == "tensor":
        return world.whole(key.rpartition(":")[0], value)
    if along == "expert":
        assert world.mesh is not None
        sharded = isinstance(value, DTensor)
        mesh = world.mesh["expert", "shard"] if sharded else world.mesh["expert"]
        shape = torch.Size((value.shape[0] * world.sizes["expert"], *value.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        places = [Shard(0)] * (1 + sharded)
        return DTensor.from_local(local(value), mesh, places, run_check=False, shape=shape, stride=stride)
    return value


def _first(error: CheckpointException) -> str:
    logging.getLogger("moiety").debug("checkpoint of several processes", exc_info=error)
    return str(next(iter(error.failures.values()))[0]).splitlines()[0]

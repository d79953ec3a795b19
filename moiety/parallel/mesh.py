"""The processes of a run as one object: who is where in the mesh, what is summed over whom.

`join` reads what torchrun put into the environment and makes a `World`; without it there is one process, whose `World`
does nothing. Losses and counts of a step are already divided by the numbers of the whole batch, so everything here that
reduces is a plain sum: no factor depends on the number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from moiety.errors import ConfigError, TrainingError
from moiety.parallel.options import MeshOptions
from moiety.parallel.watch import Watch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Layout", "World", "is_sharded", "join", "local", "meet", "restarted"]

AXES = ("data", "expert", "shard", "tensor")
BUCKET_BYTES = 64 << 20  # gradients are summed this much at a time


class Layout(NamedTuple):
    """Which part of a parameter is here.

    Args:
        along: The axis of the mesh it is divided along, "expert" or "tensor"; "" is whole.
        axis: Of the tensor.
        blocks: Sizes of the blocks along it that are divided each by itself (queries, keys, values); () is one.
    """

    along: str = ""
    axis: int = 0
    blocks: tuple[int, ...] = ()

    def cut(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """The part of one of `ranks` that share a tensor."""
        if not self.along:
            return whole
        blocks = whole.split(self.blocks or whole.shape[self.axis], self.axis)
        return torch.cat([block.chunk(ranks, self.axis)[rank] for block in blocks], self.axis)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of the parts of all ranks."""
        sizes = [size // len(parts) for size in self.blocks] or parts[0].shape[self.axis]
        pieces = [part.split(sizes, self.axis) for part in parts]
        return torch.cat([piece for block in zip(*pieces, strict=True) for piece in block], self.axis)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process; the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Is it one of FSDP2's? A process that never shards does not import what could tell: that takes 40 MiB."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class World:
    """All processes of a run, or the one that there is.

    Args:
        mesh: Of `AXES`; None is one process.
        options: What it was made from.

    `ranks` is the number of processes and `rank` which one this is.
    """

    def __init__(self, mesh: DeviceMesh | None = None, options: MeshOptions | None = None) -> None:
        self.mesh, self.options = mesh, options or MeshOptions()
        self.ranks, self.rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_rank())
        self.layouts: dict[str, Layout] = {}
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.sizes, self.place = dict.fromkeys(AXES, 1), dict.fromkeys(AXES, 0)
        if mesh is not None:
            for axis in AXES:
                self.groups[axis] = mesh.get_group(axis)
                self.sizes[axis], self.place[axis] = mesh[axis].size(), mesh[axis].get_local_rank()
            for name, axes in (("copies", AXES[:2]), ("batch", AXES[:3])):
                self.groups[name] = self.group_along(axes)

    def group_along(self, axes: Sequence[str], nodes: int = 1, *, across: bool = False) -> dist.ProcessGroup:
        """This process's group along some axes of the mesh; all processes must ask for it together.

        Args:
            axes: Of `AXES`.
            nodes: Cut each group into those of so many nodes.
            across: Then take those that have the same place in their node.
        """
        assert self.mesh is not None
        return _group(self.mesh.mesh, axes, self.options.rank_timeout, nodes=nodes, across=across)

    @property
    def leads(self) -> bool:
        """True in the process that writes and speaks."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """In how many parts every batch is divided."""
        return self.sizes["data"] * self.sizes["expert"] * self.sizes["shard"]

    @property
    def part(self) -> int:
        """Which of them is this process's."""
        place, sizes = self.place, self.sizes
        return (place["data"] * sizes["expert"] + place["expert"]) * sizes["shard"] + place["shard"]

    def rows(self, count: int) -> slice:
        """This process's part of the rows of a batch; parts differ by at most one row.

        Raises:
            ConfigError: there are fewer rows than parts.
        """
        if count < self.parts:
            raise ConfigError(
                f"a batch has {count} sequences, and {self.parts} processes divide it",
                hint="give a larger --batch, or fewer processes",
            )
        return slice(count * self.part // self.parts, count * (self.part + 1) // self.parts)

    def total(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the parts of the batch, float64; all of them are one message."""
        if self.parts == 1:
            return [value.to(torch.float64) for value in values]
        assert self.mesh is not None
        kind = self.mesh.device_type
        flat = torch.cat([value.detach().to(kind, torch.float64).flatten() for value in values])
        dist.all_reduce(flat, group=self.groups["batch"])
        sizes = [value.numel() for value in values]
        return [part.view(value.shape) for part, value in zip(flat.split(sizes), values, strict=True)]

    def summed(self, loads: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Counts by layer, summed over the parts of the batch."""
        if self.parts == 1 or not loads:
            return dict(loads)
        totals = self.total(list(loads.values()))
        return {layer: total_E.to(torch.int64) for layer, total_E in zip(loads, totals, strict=True)}

    def any(self, here: bool) -> bool:
        """True if it is true in any process."""
        if self.mesh is None:
            return here
        flag = torch.tensor([int(here)], device=self.mesh.device_type)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def told(self, text: str) -> str:
        """What the leader says."""
        if self.mesh is None:
            return text
        heard = [text]
        dist.broadcast_object_list(heard, 0)
        return heard[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A part of the work that fails everywhere if it fails anywhere.

        What torch raises is not told: mostly a connection failed, and an answer would be waited for a timeout more.

        Raises:
            TrainingError: it failed in another process, which says why.
        """
        failed, cut_off = True, False
        try:
            yield
            failed = False
        except RuntimeError:
            cut_off = True
            raise
        finally:
            anywhere = not cut_off and self.any(failed)
        if anywhere:
            raise TrainingError("another process could not go on", hint="its own message says why")

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader does it, then the others do."""
        with self.together():
            if self.leads:
                yield
        if not self.leads:
            yield
        self.any(False)

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of every parameter over the processes that have the same one and saw other tokens."""
        if self.mesh is None:
            return
        named = {name: one for name, one in model.named_parameters() if one.requires_grad}
        has = torch.tensor([one.grad is not None for one in named.values()], dtype=torch.int32)
        has = has.to(self.mesh.device_type)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        groups: dict[tuple[str, torch.dtype], list[Tensor]] = {}
        for (name, one), any_has in zip(named.items(), has.tolist(), strict=True):
            if any_has:
                if one.grad is None:
                    one.grad = torch.zeros_like(one)
                over = "data" if self._layout(name).along == "expert" else "copies"
                groups.setdefault((over, one.dtype), []).append(local(one.grad))
        for (over, _), gradients in groups.items():
            if dist.get_world_size(self.groups[over]) > 1:
                for bucket in _buckets(gradients):
                    flat = torch.cat([gradient.flatten() for gradient in bucket])
                    dist.all_reduce(flat, group=self.groups[over])
                    sizes = [gradient.numel() for gradient in bucket]
                    for gradient, sums in zip(bucket, flat.split(sizes), strict=True):
                        gradient.copy_(sums.view_as(gradient))

    def norm(self, named: Mapping[str, Tensor]) -> Tensor:
        """Euclidean norm of these gradients, by parameter; what several processes have counts once."""
        if self.mesh is None:
            return nn.utils.get_total_norm(list(named.values()))
        squares = torch.zeros(2, 3, dtype=torch.float64, device=self.mesh.device_type)
        for name, gradient in named.items():
            along = ("", "expert", "tensor").index(self._layout(name).along)
            squares[int(is_sharded(gradient)), along] += local(gradient).norm().double().square()
        dist.all_reduce(squares[1], group=self.groups["shard"])
        parts = squares.sum(0)
        dist.all_reduce(parts[1], group=self.groups["expert"])
        dist.all_reduce(parts[2], group=self.groups["tensor"])
        dtypes = [gradient.dtype for gradient in named.values()]
        return parts.sum().sqrt().to(functools.reduce(torch.promote_types, dtypes, torch.float32))

    def _layout(self, name: str) -> Layout:
        return self.layouts.get(name, Layout())

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a parameter, or of a moment of it, before any sharding."""
        layout = self._layout(name)
        if not layout.along or whole.dim() == 0:
            return whole
        return layout.cut(whole, self.place[layout.along], self.sizes[layout.along])

    def put(self, name: str, target: Tensor, whole: Tensor) -> None:
        """Write this process's part of a whole parameter, or of a moment of it, to where it belongs."""
        part = self.cut(name, whole)
        if is_sharded(target):
            from torch.distributed.tensor import distribute_tensor

            part = distribute_tensor(
                part, target.device_mesh, target.placements, src_data_rank=None
            ).to_local()
        local(target).copy_(part)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A parameter put together from its parts in all processes, which must all ask for it."""
        layout = self._layout(name)
        part = part.detach()
        if is_sharded(part):
            part = part.full_tensor()
        if not layout.along:
            return part
        parts = [torch.empty_like(part) for _ in range(self.sizes[layout.along])]
        dist.all_gather(parts, part.contiguous(), group=self.groups[layout.along])
        return layout.joined(parts)

    @contextlib.contextmanager
    def lender(self, state: Mapping[str, Tensor]) -> Iterator[Callable[[str], Tensor] | None]:
        """While inside, the leader gets whole tensors by name in any order; the others, who get None, hold theirs out.

        What was put together stays for the next few requests, so that an expert's matrices can be asked for in turn.
        """
        names, kept = [*state], dict[str, Tensor]()
        number = torch.zeros(
            1, dtype=torch.int64, device="cpu" if self.mesh is None else self.mesh.device_type
        )

        def fetch(name: str) -> Tensor:
            if not (self._layout(name).along or is_sharded(state[name])):
                return state[name]
            if name not in kept:
                while len(kept) >= 4:
                    kept.pop(next(iter(kept)))
                dist.broadcast(number.fill_(names.index(name)), 0)
                kept[name] = self.whole(name, state[name])
            return kept[name]

        if self.mesh is None or self.leads:
            cut_off = False
            try:
                yield fetch
            except RuntimeError:
                cut_off = True  # see `together`
                raise
            finally:
                if self.mesh is not None and not cut_off:
                    dist.broadcast(number.fill_(-1), 0)
            return
        while True:
            dist.broadcast(number, 0)
            if number.item() < 0:
                break
            name = names[int(number)]
            self.whole(name, state[name])
        yield None


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(one.nbytes for one in bucket) + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _group(
    ranks: Tensor, axes: Sequence[str], timeout_s: float, *, nodes: int = 1, across: bool = False
) -> dist.ProcessGroup:
    """See `World.group_along`; `ranks` has a number at every place of the mesh."""
    numbers = [AXES.index(axis) for axis in axes]
    lists = ranks.movedim(numbers, [*range(-len(numbers), 0)]).flatten(-len(numbers)).flatten(0, -2)
    lists = lists.unflatten(1, (nodes, -1))
    lists = lists.transpose(1, 2) if across else lists
    timeout = timedelta(seconds=timeout_s)
    group, _ = dist.new_subgroups_by_enumeration(lists.flatten(0, 1).tolist(), timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), (axes, lists)
    return group


def restarted() -> bool:
    """True in a run that torchrun started anew after a process was lost."""
    return _attempt() > 0


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def meet(options: MeshOptions) -> World:
    """A mesh of the processes that torch's process group already has.

    Raises:
        ConfigError: the mesh does not fit their number.
    """
    processes = dist.get_world_size()
    sizes = (
        options.copies(processes),
        options.expert_parallel,
        options.shard_parallel,
        options.tensor_parallel,
    )
    ranks = torch.arange(processes).view(sizes)
    groups = [
        _group(ranks, (axis,), options.rank_timeout) for axis in AXES
    ]  # a mesh's own wait for 30 minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return World(DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=AXES), options)


@contextlib.contextmanager
def join(options: MeshOptions) -> Iterator[World]:
    """Meet the other processes that torchrun started, and part from them at the end.

    Args:
        options: The mesh; by default every process has a copy.

    Raises:
        ConfigError: the mesh does not fit the number of processes.
        TrainingError: a process was lost; it is named.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options.copies(processes)
    if processes == 1:
        yield World()
        return
    timeout = timedelta(seconds=options.rank_timeout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, _ = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore(f"attempt {_attempt()}", store)  # torchrun keeps the store of the attempts before
    watch = Watch(store, rank, processes, options.rank_timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=processes,
        timeout=timeout,
    )
    try:
        yield meet(options)
        dist.barrier()
    except RuntimeError as error:
        raise watch.explained(error) from error
    finally:
        watch.close()
        dist.destroy_process_group()

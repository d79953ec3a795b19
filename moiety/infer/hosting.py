"""A model on a device that cannot hold all of its experts: they stay in the host's memory, and some are in slots.

Who is in which slot is decided as for experts on disk (`moiety/residency.py`). Copies go over the link on a stream of
their own: one waits for the products that still read its slot, and products wait for the copies of their slots alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor

from moiety.errors import BudgetError, DependencyError, UsageError
from moiety.infer.offload import silent
from moiety.infer.streaming import connect, residency_of
from moiety.model import load as any_model
from moiety.model.transformer import Block, Transformer
from moiety.moe.experts import Experts
from moiety.moe.hosted import HostedExperts, host_rows
from moiety.moe.layer import MoE
from moiety.moe.streamed import StreamedExperts
from moiety.residency import Key, Residency

__all__ = ["Direct", "HostStore", "Link", "SideStream", "host_experts", "host_store_of", "load_on_device"]

SLOT_MULTIPLE = 16  # bytes; torch's grouped product wants matrices to begin at such


class Link(Protocol):
    """How experts come into slots, and who waits for whom."""

    def copy(self, slot: int, slot_B: Tensor, expert_B: Tensor) -> None:
        """Begin to copy an expert into a slot, once nobody reads what was there."""

    def before(self, slots: Iterable[int]) -> None:
        """Let what is computed from now on wait until these slots hold what was last copied there."""

    def after(self, slots: Iterable[int]) -> None:
        """What was computed up to now has read these slots."""


@final
class Direct:
    """A copy is done when it returns."""

    def copy(self, slot: int, slot_B: Tensor, expert_B: Tensor) -> None:
        """See `Link`."""
        slot_B.copy_(expert_B)

    def before(self, slots: Iterable[int]) -> None:
        """See `Link`."""

    def after(self, slots: Iterable[int]) -> None:
        """See `Link`."""


@final
class SideStream:
    """Copies on a CUDA stream of their own, beside the one that computes, which must be the same in all calls.

    Args:
        device: The slots' device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)
        self._copied: dict[int, torch.cuda.Event] = {}
        self._read: dict[int, torch.cuda.Event] = {}

    def copy(self, slot: int, slot_B: Tensor, expert_B: Tensor) -> None:
        """See `Link`."""
        reading = self._read.pop(slot, None)
        if reading is not None:
            self._side.wait_event(reading)
        with torch.cuda.stream(self._side):
            slot_B.copy_(expert_B, non_blocking=True)
        self._copied[slot] = self._side.record_event()

    def before(self, slots: Iterable[int]) -> None:
        """See `Link`."""
        computing = torch.cuda.current_stream(self._device)
        for event in [self._copied.pop(slot) for slot in slots if slot in self._copied]:
            computing.wait_event(event)

    def after(self, slots: Iterable[int]) -> None:
        """See `Link`."""
        self._read |= dict.fromkeys(slots, torch.cuda.current_stream(self._device).record_event())


@final
class HostStore:
    """Experts of all layers in the host's memory, some of them in slots on a device; one call at a time.

    Args:
        layers: Of each layer its experts, uint8 (E, bytes).
        residency: Who is in which slot.
        device: Where the slots are.
        link: How they are filled.

    Attributes:
        slots_SB: The slots, uint8 (slots, bytes of each).
        copied_bytes: To the device, so far.
    """

    def __init__(
        self, layers: Sequence[Tensor], residency: Residency, device: torch.device, link: Link
    ) -> None:
        assert len(layers) == residency.layers, (len(layers), residency.layers)
        self.residency, self._layers, self._link = residency, layers, link
        self.slot_bytes = slot_bytes([one.shape[1] for one in layers])
        self.slots_SB = torch.empty(residency.slots, self.slot_bytes, dtype=torch.uint8, device=device)
        self.copied_bytes = 0
        self._calling = threading.RLock()  # a guess comes in the middle of a call

    def waves(self, layer: int, experts: Sequence[int]) -> Generator[Mapping[int, int]]:
        """The experts of one call in groups, each with its slot, valid until the next group is asked for.

        The first group is what is there already; while it is worked with, others are copied.
        """
        with self._calling:
            ready, missing = self.residency.begin(layer, experts)
            most = self.residency.passing if self.residency.sweeps else len(missing)
            missing.reverse()
            coming: dict[int, int] = {}
            try:
                while ready or coming or missing:
                    while missing and len(coming) < most:
                        taken = self.residency.take((layer, missing[-1]))
                        if taken is None:
                            break
                        coming[missing.pop()] = taken.slot
                        self._copy(taken.key, taken.slot)
                    if not ready:
                        ready, coming = coming, {}
                    assert ready, (layer, experts, "every slot is in use")
                    self._link.before(ready.values())
                    yield ready
                    self._link.after(ready.values())
                    self.residency.release([(layer, expert) for expert in ready])
                    ready = {}
            finally:  # also where the caller gave up: what is on its way will arrive
                self.residency.release([(layer, expert) for expert in experts])

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """These may be wanted next: copy them into spare slots, behind what is wanted now."""
        with self._calling:
            for expert in experts:
                slot = self.residency.guess((layer, expert))
                if slot is not None:
                    self._copy((layer, expert), slot)
                    self.residency.release([(layer, expert)])

    def _copy(self, key: Key, slot: int) -> None:
        expert_B = self._layers[key[0]][key[1]]
        self._link.copy(slot, self.slots_SB[slot, : len(expert_B)], expert_B)
        self.copied_bytes += len(expert_B)


def slot_bytes(sizes: Iterable[int]) -> int:
    """Of a slot that can hold any expert of these sizes."""
    return -(-max(sizes) // SLOT_MULTIPLE) * SLOT_MULTIPLE


def host_store_of(model: Transformer) -> HostStore | None:
    """Where a model's experts come from; None where they are not in the host's memory for another device."""
    sources = (module.source for module in model.modules() if isinstance(module, HostedExperts))
    return next((one for one in sources if isinstance(one, HostStore)), None)


def host_experts(
    model: Transformer,
    memory_bytes: int,
    device: torch.device,
    *,
    policy: str = "auto",
    prefetch: bool = True,
    link: Link | None = None,
    say: Callable[[str], None] = silent,
) -> None:
    """Put a model on a device, its experts into the host's memory and as many slots on the device as fit.

    Args:
        model: With plain weights, on the CPU; in evaluation mode afterwards.
        memory_bytes: Of the device, for weights: those outside of the experts, and slots.
        device: Where it computes.
        policy: A name of `moiety.residency.POLICIES`, or "auto".
        prefetch: Foresee the next layer's experts.
        link: How slots are filled; None takes what the device wants.
        say: Told, in sentences, what was decided.

    Raises:
        BudgetError: not even the experts that a token uses in one layer fit.
        UsageError: the model is dense, or packed.
        ConfigError: no such policy.
    """
    layers = _plain_layers(model)
    owned = [module for _, _, module in layers]
    expert_bytes = [sum(one[0].nbytes for one in module.parameters()) for module in owned]
    all_bytes = sum(size * one.count for size, one in zip(expert_bytes, owned, strict=True))
    dense_bytes = sum(one.nbytes for one in (*model.parameters(), *model.buffers())) - all_bytes
    slot, count = slot_bytes(expert_bytes), sum(one.count for one in owned)
    assert model.config.moe is not None
    chosen = [model.config.moe.at(layer).experts_per_token for layer in model.config.moe_layers]
    slots = min(max(memory_bytes - dense_bytes, 0) // slot, count)
    if slots < max(chosen):
        raise BudgetError(
            f"{memory_bytes:,} bytes are too few; the smallest is {dense_bytes + max(chosen) * slot:,}",
            hint=f"{dense_bytes:,} outside of the experts, and {max(chosen)} slots of {slot:,}",
        )
    residency, guesses, said = residency_of(slots, slot, chosen, policy, prefetch=prefetch)
    is_cuda = device.type == "cuda"
    rows = list[Tensor]()
    for module in owned:
        rows.append(host_rows(module, pin=is_cuda))
        module.to("meta")  # its shapes stay, its weights go
    store = HostStore(rows, residency, device, link or (SideStream(device) if is_cuda else Direct()))
    hosted = list[tuple[Block, StreamedExperts | HostedExperts]]()
    for layer, (block, moe, module) in enumerate(layers):
        moe.experts = HostedExperts(module, store, layer)
        hosted.append((block, moe.experts))
    model.requires_grad_(False).eval().to(device)
    connect(hosted, guesses=guesses)
    mine, slab, everything = (f"{one / 2**20:,.0f}" for one in (dense_bytes, slots * slot, all_bytes))
    say(
        f"{device}: {mine} MiB of weights + {slab} for {slots} of {count} experts; all, {everything}, are on the host"
    )
    if said:
        say(said)


def _plain_layers(model: Transformer) -> list[tuple[Block, MoE, Experts]]:
    """Every layer with experts.

    Raises:
        UsageError: there is none, or one is packed.
    """
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    layers = [(one, one.feed_forward) for one in blocks if isinstance(one.feed_forward, MoE)]
    found = [(one, moe, moe.experts) for one, moe in layers if isinstance(moe.experts, Experts)]
    if not layers or len(found) < len(layers):
        raise UsageError(
            "the experts of this model are packed" if layers else "this model has no experts",
            hint="packed ones are multiplied on CPUs; a dense model is loaded without a budget",
        )
    return found


def load_on_device(
    path: str | Path,
    memory_bytes: int,
    device: str,
    *,
    say: Callable[[str], None] = silent,
    **options: Any,
) -> Transformer:
    """Read a plain model and keep its experts on the host (`host_experts`); options are those of `moiety.load`.

    Raises:
        UsageError: no such device, one that streams from disk instead, or a model without plain experts.
        DependencyError: this machine or this torch has no such device.
        BudgetError, FormatError, StorageError, ConfigError: as `host_experts` and `moiety.load`.
    """
    if device.partition(":")[0] != "cuda":
        raise UsageError(
            f"device is {device!r}; experts are kept on the host for 'cuda' or 'cuda:1'",
            hint="on a CPU a packed model streams from disk: leave device out",
        )
    if not torch.cuda.is_available():
        raise DependencyError(
            "there is no CUDA device here, or torch was built without", hint="moiety doctor"
        )
    model = any_model.load(path, **options)
    if not isinstance(model, Transformer):
        raise UsageError(f"{path} is an encoder-decoder, which is not kept on the host")
    host_experts(model, memory_bytes, torch.device(device), say=say)
    return model

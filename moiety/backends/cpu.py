"""Products with packed weights on a CPU, by the C kernels in `native/`: for inference, without gradients.

The weights stay as `moiety.formats.tiles` packed them; activations are float32, and before they meet an integer format
each group of columns of a row is rounded to eight bits with a scale of its own. Every output is summed in one fixed
order, so it does not depend on what else is in the batch. The instruction set is the processor's best, or the one in
MOIETY_CPU_LEVEL; AMX is used only where it is asked for there. Without the compiled kernels torch multiplies after
unpacking, which `doctor` reports.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moiety.backends import reference
from moiety.backends.cpu_memory import into_huge_pages
from moiety.backends.weights import CLAMPED, ExpertWeights
from moiety.errors import DependencyError
from moiety.formats import Format
from moiety.formats.tiles import ROWS, PackedWeight, unpack
from moiety.routing import Routing

__all__ = [
    "LEVELS",
    "Matrix",
    "PackedExpertWeights",
    "check",
    "combine",
    "crew",
    "expert_mlp",
    "expert_rows",
    "grouped_linear",
    "level",
    "levels",
    "library",
    "linear",
    "no_amx",
]

LEVELS = ("portable", "avx2", "avx512", "amx")  # in the order of `enum level`
UNTRIED = "amx"  # on a processor: it has run in emulation only, and is used where it is asked for by name
LEVEL_VARIABLE = "MOIETY_CPU_LEVEL"
LIBRARY_VARIABLE = "MOIETY_CPU_LIBRARY"  # for tests: a file with the kernels, built in another way
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, CLAMPED: 5}  # of `enum activation`


class _CMatrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "place", "bias")),
        *(
            (name, ctypes.c_int64)
            for name in ("experts", "row_blocks", "groups", "tile_bytes", "expert_bytes", "rows", "columns")
        ),
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
    ]


class _CCrew(ctypes.Structure):
    _fields_ = [("parallel", ctypes.c_void_p), ("threads", ctypes.c_int32), ("level", ctypes.c_int32)]


def _kind(form: Format) -> int:
    """The number of a format's codes in `enum kind`."""
    if form.kind == "integer":
        return 3 if form.bits == 8 else 5 if form.minimum else 4
    if form.kind == "table":
        return 6 if form.scale_bits == 8 else 7
    return ("float32", "bfloat16", "float8").index(form.kind)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was built without a compiler.

    Raises:
        DependencyError: MOIETY_CPU_LIBRARY names a file that cannot be loaded.
    """
    folder, asked = Path(__file__).parent, os.environ.get(LIBRARY_VARIABLE, "")
    found = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").is_file()]
    if not found and not asked:
        return None
    try:
        kernels = ctypes.CDLL(asked or str(found[0]))
    except OSError as error:
        raise DependencyError(f"the compiled kernels cannot be loaded: {error}") from error
    pointer, wide, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    kernels.moiety_best_level.restype = small
    kernels.moiety_no_amx.restype = ctypes.c_char_p
    kernels.moiety_read.restype = kernels.moiety_multiply.restype = wide
    layer: list[Any] = [pointer, pointer, small, small, ctypes.c_float, pointer, wide, wide]
    taken: tuple[tuple[Any, list[Any]], ...] = (
        (kernels.moiety_grouped_linear, [pointer, pointer, wide, wide, pointer, pointer, pointer]),
        (kernels.moiety_experts, [*layer, pointer, pointer, pointer, wide, pointer, pointer]),
        (kernels.moiety_expert_rows, [*layer, pointer, pointer, wide, pointer, pointer, pointer]),
        (kernels.moiety_combine, [pointer, wide, pointer, pointer, wide, wide, pointer, pointer]),
        (kernels.moiety_unpack, [pointer, wide, small, small, pointer, pointer]),
    )
    for operation, arguments in taken:
        operation.restype = small if operation is not kernels.moiety_unpack else None
        operation.argtypes = arguments
    return kernels


@functools.cache
def _torch_threads() -> int:
    """The address of the GOMP_parallel that torch runs on, so that no second set of threads is made; 0 without."""
    try:
        return ctypes.cast(ctypes.CDLL("libgomp.so.1").GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def levels() -> tuple[str, ...]:
    """Instruction sets that can be used here, the best last; none without the compiled kernels."""
    kernels = library()
    return () if kernels is None else LEVELS[: kernels.moiety_best_level() + 1]


def no_amx() -> str:
    """Why AMX cannot be used here; empty where it can."""
    kernels = library()
    reason = b"the kernels are not compiled here" if kernels is None else kernels.moiety_no_amx()
    return (reason or b"").decode()


@functools.cache
def level() -> str:
    """The instruction set in use; empty without the compiled kernels.

    Raises:
        DependencyError: MOIETY_CPU_LEVEL names one that this machine does not have.
    """
    asked, usable = os.environ.get(LEVEL_VARIABLE, ""), levels()
    if asked and asked not in usable:
        why = f" (AMX: {no_amx()})" if asked == "amx" else ""
        raise DependencyError(
            f"{LEVEL_VARIABLE} is {asked!r}; this machine can use {', '.join(usable) or 'none'}{why}",
            hint="unset it to let the best be chosen",
        )
    return asked or next((name for name in reversed(usable) if name != UNTRIED), "")


def crew() -> int:
    """The address of who works: as many threads as torch uses now, at the level in use."""
    return ctypes.addressof(_crew(torch.get_num_threads(), level()))


@functools.cache
def _crew(threads: int, name: str) -> _CCrew:
    return _CCrew(_torch_threads(), threads, LEVELS.index(name))


class Matrix:
    """A packed weight, ready to be multiplied with.

    Args:
        weight: Packed; its tiles may be a view that skips bytes between one expert and the next.
        bias: (rows,) or (E, rows), or None; it is kept in float32.
        place: Where the matrices of `weight` are slots that experts come into and leave: bytes from its first tile to
            each expert's, -1 for one that is not there, int64 (E,). It is looked at in every call, never copied.
    """

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None = None, *, place: Tensor | None = None
    ) -> None:
        self.weight, self.place = weight, place
        self.experts = weight.experts if place is None else len(place)
        self.bias = None if bias is None else bias.float().reshape(self.experts, weight.rows)
        self._bias_tiles = None if self.bias is None else _bias_tiles(self.bias, weight)
        tiles = weight.tiles
        assert tiles.device.type == "cpu" and tiles[0].is_contiguous(), (tiles.device, tiles.stride())
        if place is not None:
            assert place.dtype == torch.int64 and place.is_contiguous(), (place.dtype, place.stride())
        else:  # slots are in the hands of whoever fills them
            into_huge_pages(tiles)
        self._as_c = _CMatrix(
            tiles.data_ptr(),
            None if place is None else place.data_ptr(),
            None if self._bias_tiles is None else self._bias_tiles.data_ptr(),
            self.experts,
            *tiles.shape[1:],
            tiles.stride(0),
            weight.rows,
            weight.columns,
            _kind(weight.form),
            weight.form.group,
        )
        self.address = ctypes.addressof(self._as_c)

    def unpacked(self) -> Tensor:
        """(E, rows, columns) float32; NaN for an expert that is not there."""
        if self.place is None:
            return unpack(self.weight)
        found = unpack(self.weight)[self.place.clamp(min=0) // self.weight.tiles.stride(0)]
        found[self.place < 0] = torch.nan
        return found


def _bias_tiles(bias_EF: Tensor, weight: PackedWeight) -> Tensor:
    """A bias in the order of the packed rows, padded like them, (E, row blocks * 16)."""
    halves = bias_EF.unflatten(1, (2, -1)) if weight.interleaved else bias_EF[:, None]
    padded = torch.nn.functional.pad(halves, (0, -halves.shape[2] % ROWS))
    blocks: Tensor = padded.unflatten(2, (-1, ROWS)).transpose(1, 2)
    return blocks.flatten(1).contiguous()


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedExpertWeights:
    """The experts of one layer, packed.

    Args:
        up: (E, 2F, D) with interleaved halves when gated, else (E, F, D).
        down: (E, D, F).
        activation: A name in `weights.ACTIVATIONS`, or `CLAMPED`.
        gated: act(gate) * up.
        activation_limit: Of `CLAMPED`.
    """

    up: Matrix
    down: Matrix
    activation: str = "silu"
    gated: bool = True
    activation_limit: float = 7.0

    def unpacked(self) -> ExpertWeights:
        """In float32, as `reference` takes them."""
        return ExpertWeights(
            up=self.up.unpacked(),
            down=self.down.unpacked(),
            up_bias=self.up.bias,
            down_bias=self.down.bias,
            activation=self.activation,
            gated=self.gated,
            activation_limit=self.activation_limit,
        )


def _ready(x: Tensor) -> Tensor:
    """Rows as the kernels read them: float32, each row contiguous."""
    wide = x if x.dtype == torch.float32 else x.float()
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def check(failed: int) -> None:
    """What a kernel answers, a number of `enum failure`; MemoryError where it found no memory."""
    assert failed != 2, "an expert with rows is not in memory"
    if failed:
        raise MemoryError("no memory for the rows that are multiplied; give fewer at once")


def grouped_linear(x_ND: Tensor, matrix: Matrix, counts_E: Tensor | None = None) -> Tensor:
    """y = x W_e^T + b_e for rows sorted by expert, (N, D) to (N, F) in x's dtype; without counts for one expert."""
    weight = matrix.weight
    assert not weight.interleaved and x_ND.shape[1] == weight.columns, (x_ND.shape, weight.columns)
    if not level():
        counts_E = torch.tensor([len(x_ND)]) if counts_E is None else counts_E
        return reference.grouped_linear(x_ND.float(), matrix.unpacked(), counts_E, matrix.bias).to(x_ND.dtype)
    assert counts_E is not None or matrix.experts == 1, matrix.experts
    rows_ND, kernels = _ready(x_ND), library()
    assert kernels is not None
    y_NF = torch.empty(len(x_ND), weight.rows)
    counts = None if counts_E is None else counts_E.data_ptr()
    check(
        kernels.moiety_grouped_linear(
            matrix.address,
            rows_ND.data_ptr(),
            len(rows_ND),
            rows_ND.stride(0),
            counts,
            y_NF.data_ptr(),
            crew(),
        )
    )
    return y_NF if x_ND.dtype == torch.float32 else y_NF.to(x_ND.dtype)


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """y = x W^T + b, (..., D) to (..., F): the grouped linear of one expert."""
    return grouped_linear(x.reshape(-1, x.shape[-1]), matrix).view(*x.shape[:-1], matrix.weight.rows)


def expert_mlp(x_TD: Tensor, routing: Routing, weights: PackedExpertWeights) -> Tensor:
    """y[token] += weight * expert(x[token]), in x's dtype; see `reference.expert_mlp`, which defines it."""
    kernels = library()
    if not level() or kernels is None:
        return reference.expert_mlp(x_TD.float(), routing, weights.unpacked()).to(x_TD.dtype)
    rows_TD, weight_N = _ready(x_TD), _ready(routing.weight_N)
    y_TD = torch.empty(len(x_TD), weights.down.weight.rows)
    check(
        kernels.moiety_experts(
            *_layer(rows_TD, routing, weights), weight_N.data_ptr(), routing.counts_E.data_ptr(), routing.pairs,
            y_TD.data_ptr(), crew(),
        )
    )  # fmt: skip
    return y_TD if x_TD.dtype == torch.float32 else y_TD.to(x_TD.dtype)


def _layer(rows_TD: Tensor, routing: Routing, weights: PackedExpertWeights) -> tuple[Any, ...]:
    """The arguments with which every call about a layer's experts begins."""
    up, down = weights.up, weights.down
    assert rows_TD.shape[1] == up.weight.columns and up.weight.interleaved == weights.gated, rows_TD.shape
    assert routing.experts == up.experts == down.experts, (routing.experts, up.experts, down.experts)
    return (
        up.address, down.address, ACTIVATIONS[weights.activation], weights.gated, weights.activation_limit,
        rows_TD.data_ptr(), len(rows_TD), rows_TD.stride(0), routing.token_N.data_ptr(),
    )  # fmt: skip


def expert_rows(
    x_TD: Tensor, routing: Routing, weights: PackedExpertWeights, mask_E: Tensor, answers_ND: Tensor
) -> None:
    """The first half of `expert_mlp` for some experts: expert(x[token]) of each of their pairs.

    Calls for the others, in any order, and `combine` give the bits of the one call.

    Args:
        x_TD: Tokens, (T, D).
        routing: Who goes where.
        weights: The experts; those that the mask leaves out are not read.
        mask_E: Which experts, bool or uint8 (E,).
        answers_ND: Where the answers go, float32 (N, D); rows of other experts' pairs stay as they are.
    """
    assert mask_E.dtype in (torch.bool, torch.uint8) and mask_E.is_contiguous(), mask_E.dtype
    assert mask_E.shape == routing.counts_E.shape, (mask_E.shape, routing.experts)
    assert answers_ND.shape == (routing.pairs, weights.down.weight.rows), answers_ND.shape
    assert answers_ND.dtype == torch.float32 and answers_ND.is_contiguous(), answers_ND.dtype
    kernels = library()
    if not level() or kernels is None:
        mine_N = mask_E.bool()[routing.expert_N]
        answers_ND[mine_N] = reference.expert_rows(x_TD.float(), routing, weights.unpacked())[mine_N]
        return
    rows_TD = _ready(x_TD)
    check(
        kernels.moiety_expert_rows(
            *_layer(rows_TD, routing, weights), routing.counts_E.data_ptr(), routing.pairs, mask_E.data_ptr(),
            answers_ND.data_ptr(), crew(),
        )
    )  # fmt: skip


def combine(answers_ND: Tensor, routing: Routing) -> Tensor:
    """The other half: each token's sum of weight * answer, float32 (T, D), experts ascending."""
    kernels = library()
    if not level() or kernels is None:
        return routing.with_weights(routing.weight_N.float()).combine(answers_ND)
    assert answers_ND.dtype == torch.float32 and answers_ND.is_contiguous(), answers_ND.dtype
    assert len(answers_ND) == routing.pairs, (answers_ND.shape, routing.pairs)
    y_TD, weight_N = torch.empty(routing.tokens, answers_ND.shape[1]), _ready(routing.weight_N)
    check(
        kernels.moiety_combine(
            answers_ND.data_ptr(), answers_ND.shape[1], routing.token_N.data_ptr(), weight_N.data_ptr(),
            routing.pairs, routing.tokens, y_TD.data_ptr(), crew(),
        )
    )  # fmt: skip
    return y_TD

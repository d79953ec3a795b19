"""Packed matrices as tensors, for what a gradient passes through: one at a time, or some rows of one at a time."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from moiety.backends import cpu, matmul
from moiety.backends.cpu import Matrix
from moiety.backends.matmul import multiply_rows_back, multiply_rows_into
from moiety.formats.tiles import ROWS, PackedWeight, unpack

__all__ = ["Unpacked", "UnpackedRows"]

MOST_LENT_BYTES = 64 << 20
PART_BYTES = 32 << 20

_lent = threading.local()


def _lend(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory of this thread for one unpacked matrix, (rows, columns): new pages would take as long as unpacking."""
    size = rows * columns * dtype.itemsize
    if size > MOST_LENT_BYTES:
        return torch.empty(rows, columns, dtype=dtype)
    room = getattr(_lent, "room", None)
    if room is None or len(room) < size:
        room = _lent.room = torch.empty(size, dtype=torch.uint8)
    return cast(Tensor, room)[:size].view(dtype).view(rows, columns)


class Unpacked:
    """The matrices of a packed weight one at a time, as tensors.

    None is kept: one is there until this thread asks for the next, of this or another weight.

    Args:
        matrix: Packed, all its experts in memory.
        dtype: Of what they are multiplied with; theirs is a wider one where products are.
    """

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        assert matrix.place is None, "experts that come and go pass no gradients"
        self._matrix = matrix
        self._dtype = dtype if matmul.has_products(dtype) else torch.promote_types(dtype, torch.float32)
        self.shape = (matrix.experts, matrix.weight.rows, matrix.weight.columns)

    def __getitem__(self, expert: int) -> Tensor:
        weight, kernels = self._matrix.weight, cpu.library()
        if not cpu.level() or kernels is None:
            return unpack(replace(weight, experts=1, tiles=weight.tiles[expert : expert + 1]))[0].to(
                self._dtype
            )
        half = self._dtype == torch.bfloat16
        to = _lend(weight.columns, weight.rows, torch.bfloat16 if half else torch.float32)
        kernels.moiety_unpack(
            self._matrix.address, expert, 2 if weight.interleaved else 1, half, to.data_ptr(), cpu.crew()
        )
        return to.t().to(self._dtype)


class UnpackedRows:
    """One packed matrix W, (F, D), too large to be unpacked whole beside everything else: an output head.

    Args:
        matrix: Packed, of one expert.
        dtype: Of what W is multiplied with, and of the products.
    """

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        weight = matrix.weight
        assert weight.experts == 1 and not weight.interleaved, weight
        self.dtype, self.shape = dtype, (weight.rows, weight.columns)
        most = max(PART_BYTES // (weight.columns * 4) // ROWS, 1) * ROWS
        self._parts = [
            (slice(at, at + most), Unpacked(Matrix(_rows(weight, at, most)), dtype))
            for at in range(0, weight.rows, most)
        ]

    def __len__(self) -> int:
        return self.shape[0]

    def multiply(self, x_ND: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """x W^T + b, (N, F). No gradient."""
        y_NF = x_ND.new_empty(len(x_ND), len(self))
        for rows, part in self._parts:
            multiply_rows_into(y_NF[:, rows], x_ND, part[0])
        return y_NF if bias_F is None else y_NF.add_(bias_F)

    def multiply_back(self, grad_NF: Tensor) -> Tensor:
        """g W, (N, D): the gradient with respect to the rows; what the parts give is summed in float32 at least."""
        wide = torch.promote_types(grad_NF.dtype, torch.float32)
        sum_ND = grad_NF.new_zeros(len(grad_NF), self.shape[1], dtype=wide)
        for rows, part in self._parts:
            sum_ND += multiply_rows_back(grad_NF[:, rows], part[0])
        return sum_ND.to(grad_NF.dtype)


def _rows(weight: PackedWeight, first: int, count: int) -> PackedWeight:
    """So many of the rows from one on, which starts a tile; fewer where they end."""
    tiles = weight.tiles[:, first // ROWS : (first + count) // ROWS]
    return replace(weight, rows=min(count, weight.rows - first), tiles=tiles)

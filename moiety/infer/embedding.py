"""A token embedding that stays on disk: a step looks up a few rows, and the room of the others is for experts."""

from __future__ import annotations

import os
import weakref
from array import array
from dataclasses import replace
from typing import final

import torch
import xxhash
from torch import Tensor, nn

from moiety.errors import FormatError
from moiety.model.quantized import OpenModel
from moiety.model.tensor_file import TensorFile
from moiety.moe.packed import PackedLinear

__all__ = ["StreamedEmbedding", "leave_embedding"]

NAME = "embed.weight"


@final
class StreamedEmbedding(nn.Module):
    """Stands where `nn.Embedding` stood; a row is read when a token asks for it.

    It is compared with its checksum (XXH3), which is taken when the model is loaded, for the file may be changed later.

    Attributes:
        weight: Of the shape and dtype that the embedding would have (V, D), and all of it one NaN.

    Args:
        file: Holds it. It is kept open, so it may be replaced or removed meanwhile.
        dtype: Of what is looked up; None is that of the file.

    Raises:
        FormatError, StorageError: it could not be read.
    """

    def __init__(self, file: TensorFile, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        stored, shape, _, _ = file.places[NAME]
        self.weight = torch.full((1, 1), torch.nan, dtype=dtype or stored).expand(shape)
        self._file = replace(file, descriptor=os.dup(file.descriptor))
        weakref.finalize(self, os.close, self._file.descriptor)
        self._checksum_V = array("Q", (self._read(row)[1] for row in range(shape[0])))

    def _read(self, row: int) -> tuple[Tensor, int]:
        row_D = self._file.read(NAME, row)
        return row_D, xxhash.xxh3_64_intdigest(row_D.view(torch.uint8).numpy().data)

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows of tokens (...), (..., D).

        Raises:
            FormatError: the file was changed or cut meanwhile.
            StorageError: the system refused to read.
        """
        token_U, place = tokens.unique(return_inverse=True)
        rows_UD = torch.empty(len(token_U), self.weight.shape[1], dtype=self.weight.dtype)
        for at, token in enumerate(token_U.tolist()):
            row_D, found = self._read(token)
            if found != self._checksum_V[token]:
                raise FormatError(
                    f"{self._file.path}: the embedding of token {token} is not what it was when the model was loaded",
                    hint="the file was changed in use, or the disk fails: load the model again",
                )
            rows_UD[at] = row_D
        return rows_UD[place]


def leave_embedding(opened: OpenModel, dtype: torch.dtype | None = None) -> set[str]:
    """Let a model look its embedding up on disk, unless it is the head too; the names of what it then does not hold."""
    if not isinstance(opened.model.head, PackedLinear | nn.Linear):
        return set()
    opened.model.add_module("embed", StreamedEmbedding(opened.plain, dtype))
    return {NAME}

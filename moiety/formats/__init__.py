"""Weights as numbers of fewer bits: what a format is, and the table of them.

`numbers` turns weights into codes and scales and back: the meaning of a format. `tiles` puts codes and scales in the
order in which a processor reads them. `stored` reads and writes what other people's checkpoints hold. `policy`
says which part of a model gets which format. This page and `policy` need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moiety.errors import ConfigError

__all__ = ["FORMATS", "FP4", "NF4", "ROWS", "Format", "format_named", "shape_of", "tile_bytes"]

ROWS = 16  # of a tile

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1
# The sixteen quantiles of a normal distribution that QLoRA keeps, scaled to [-1, 1] (arXiv 2305.14314).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

Kind = Literal["float32", "bfloat16", "float8", "integer", "table"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a matrix's numbers are stored. A group is consecutive columns of one row that share a scale.

    value = scale * (code - zero), plus the group's minimum where there is one; of a table scale * values[code]; of
    float8 scale * the number that the code is in E4M3. The codes of float32 and bfloat16 are the numbers themselves.

    Args:
        name: As users write it.
        kind: Which of those.
        bits: Of a code.
        group: Columns that share a scale, and the multiple to which columns are padded in tiles.
        by_row: All groups of a row have the same scale.
        zero: The code of 0, for integers.
        minimum: Each group has a float16 minimum.
        values: What the codes of a table mean.
        scale_bits: 16 (float16), 8 (a power of two, 127 is 1), or 0 (no scale).
    """

    name: str
    kind: Kind
    bits: int
    group: int
    by_row: bool = False
    zero: int = 0
    minimum: bool = False
    values: tuple[float, ...] = ()
    scale_bits: int = 16

    @property
    def bits_per_weight(self) -> float:
        """With scales and minimums, as tiles hold them."""
        return self.bits + (self.scale_bits + 16 * self.minimum) / self.group


def _formats() -> dict[str, Format]:
    found = [
        Format(name="f32", kind="float32", bits=32, group=16, scale_bits=0),
        Format(name="bf16", kind="bfloat16", bits=16, group=32, scale_bits=0),
        Format(name="fp8", kind="float8", bits=8, group=128),
        Format(name="int8", kind="integer", bits=8, group=128, by_row=True, zero=128),
        Format(name="mxfp4", kind="table", bits=4, group=32, values=FP4, scale_bits=8),
    ]
    for group in (32, 64, 128):
        found += [
            Format(name=f"int8-g{group}", kind="integer", bits=8, group=group, zero=128),
            Format(name=f"int4-g{group}", kind="integer", bits=4, group=group, zero=8),
            Format(name=f"int4-g{group}-asym", kind="integer", bits=4, group=group, minimum=True),
            Format(name=f"nf4-g{group}", kind="table", bits=4, group=group, values=NF4),
        ]
    return {item.name: item for item in found}


FORMATS = _formats()


def format_named(name: str) -> Format:
    """The format called `name`; `int4` is int4-g32 and `nf4` is nf4-g64.

    Raises:
        ConfigError: there is none of this name.
    """
    name = {"int4": "int4-g32", "int4-asym": "int4-g32-asym", "nf4": "nf4-g64"}.get(name, name)
    if name not in FORMATS:
        raise ConfigError(f"there is no weight format {name!r}", hint=f"there are {', '.join(FORMATS)}")
    return FORMATS[name]


def tile_bytes(form: Format) -> int:
    """Bytes of one tile; `tiles` says what is in it."""
    return ROWS * (form.group * form.bits + form.scale_bits + 16 * form.minimum) // 8


def shape_of(
    form: Format, *, experts: int, rows: int, columns: int, interleaved: bool
) -> tuple[int, int, int, int]:
    """The shape of a weight's tiles."""
    halves = 2 if interleaved else 1
    return experts, halves * -(-rows // halves // ROWS), -(-columns // form.group), tile_bytes(form)

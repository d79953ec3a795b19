"""Matrices that the kernels unpack one at a time are those that tiles mean, bit for bit."""

from __future__ import annotations

import pytest
import torch

from moiety.backends import cpu
from moiety.formats import FORMATS
from moiety.formats.tiles import pack, unpack

SHAPES = [(False, 37, 300), (True, 54, 130), (True, 64, 128), (False, 16, 3)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("interleaved", "rows", "columns"), SHAPES)
def test_unpacked_is_what_the_tiles_mean(
    level: str, form: str, interleaved: bool, rows: int, columns: int
) -> None:
    assert cpu.level() == level
    packed = pack(torch.randn(3, rows, columns), FORMATS[form], interleaved=interleaved)
    matrix, true = cpu.Matrix(packed), unpack(packed)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        stack = cpu.Unpacked(matrix, dtype)
        assert stack.shape == (3, rows, columns)
        for expert in range(3):
            assert stack[expert].dtype == dtype
            if "asym" in form:  # product and sum may be rounded at once
                torch.testing.assert_close(stack[expert], true[expert].to(dtype), rtol=8e-3, atol=1e-6)
            else:
                assert torch.equal(stack[expert], true[expert].to(dtype))


def test_without_kernels_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(torch.randn(2, 20, 40), FORMATS["nf4-g64"])
    before = cpu.Unpacked(cpu.Matrix(packed), torch.float32)[1]
    monkeypatch.setattr(cpu, "level", lambda: "")
    assert torch.equal(cpu.Unpacked(cpu.Matrix(packed), torch.float32)[1], before)

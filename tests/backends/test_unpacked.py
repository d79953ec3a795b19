"""Matrices that the kernels unpack one at a time are those that tiles mean, bit for bit."""

from __future__ import annotations

import pytest
import torch

from moiety.backends import cpu, matmul, unpacked
from moiety.backends.unpacked import Unpacked, UnpackedRows
from moiety.formats import FORMATS
from moiety.formats.tiles import pack, unpack
from tests.oracle import DTYPES, assert_close_enough

SHAPES = [(False, 37, 300), (True, 54, 130), (True, 64, 128), (False, 16, 3)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("interleaved", "rows", "columns"), SHAPES)
def test_unpacked_is_what_the_tiles_mean(
    level: str, form: str, interleaved: bool, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu.level() == level
    monkeypatch.setattr(matmul, "has_products", lambda dtype: True)
    packed = pack(torch.randn(3, rows, columns), FORMATS[form], interleaved=interleaved)
    matrix, true = cpu.Matrix(packed), unpack(packed)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        stack = Unpacked(matrix, dtype)
        assert stack.shape == (3, rows, columns)
        for expert in range(3):
            assert stack[expert].dtype == dtype
            if "asym" in form:  # product and sum may be rounded at once
                torch.testing.assert_close(stack[expert], true[expert].to(dtype), rtol=8e-3, atol=1e-6)
            else:
                assert torch.equal(stack[expert], true[expert].to(dtype))


def test_where_products_are_float32_so_are_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_products", lambda dtype: dtype in (torch.float32, torch.float64))
    packed = pack(torch.randn(2, 20, 40), FORMATS["nf4-g64"])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(Unpacked(cpu.Matrix(packed), dtype)[1], unpack(packed)[1])
    assert Unpacked(cpu.Matrix(packed), torch.float64)[1].dtype == torch.float64


def test_without_kernels_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(torch.randn(2, 20, 40), FORMATS["nf4-g64"])
    before = Unpacked(cpu.Matrix(packed), torch.float32)[1]
    monkeypatch.setattr(cpu, "level", lambda: "")
    assert torch.equal(Unpacked(cpu.Matrix(packed), torch.float32)[1], before)


@pytest.mark.parametrize("form", ["nf4-g64", "int8-g32", "bf16"])
@pytest.mark.parametrize("rows", [16, 50, 96])
def test_some_rows_at_a_time_give_the_same_products(
    rows: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(torch.randn(1, rows, 40), FORMATS[form])
    true = unpack(packed)[0].double()
    for dtype in DTYPES:
        monkeypatch.setattr(unpacked, "PART_BYTES", 32 * 40 * max(dtype.itemsize, 4))  # 32 or 64 rows
        matrix = UnpackedRows(cpu.Matrix(packed), dtype)
        assert matrix.shape == (rows, 40) and len(matrix) == rows and matrix.dtype == dtype
        x, grad, bias = (torch.randn(*shape).to(dtype) for shape in ((21, 40), (21, rows), (rows,)))
        weight = true.to(dtype)
        assert_close_enough(
            matrix.multiply(x, bias), x @ weight.T + bias, x.double() @ true.T + bias.double()
        )
        assert_close_enough(matrix.multiply_back(grad), grad @ weight, grad.double() @ true)
        few = matrix.multiply(x[:1])
        torch.testing.assert_close(few, matrix.multiply(x)[:1], rtol=1e-2, atol=0.1)


def test_a_large_head_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss through a packed head asks for no room as large as the head unpacked."""
    monkeypatch.setattr(unpacked, "PART_BYTES", 1 << 16)
    packed = pack(torch.randn(1, 2048, 64), FORMATS["nf4-g64"])
    matrix = UnpackedRows(cpu.Matrix(packed), torch.float32)
    assert max(part[0].numel() for _, part in matrix._parts) * 4 <= 1 << 16
    assert [rows.start for rows, _ in matrix._parts] == list(range(0, 2048, 256))

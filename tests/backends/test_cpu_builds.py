"""The kernels' own tests on kernels built in other ways: tiles of AMX in emulation, and under sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from moiety.backends import cpu
from moiety.errors import DependencyError
from tests.backends.builds import KERNEL_TESTS, ROOT, build, compiler, run_python

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider")


def environment(library: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != cpu.LEVEL_VARIABLE}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        cpu.LIBRARY_VARIABLE: str(library),
        **more,
    }


@pytest.mark.slow
@pytest.mark.timeout_s(900)
@pytest.mark.skipif("avx512" not in cpu.levels(), reason="the AMX level stands on AVX-512, which is not here")
def test_amx_in_emulation(tmp_path: Path) -> None:
    """Its tests, and that all levels agree; the emulation ends the program where a tile would be misused."""
    place = environment(build(tmp_path / "emulated.so", "-DMOIETY_EMULATE_AMX"))
    said = run_python(
        place, "-c", "from moiety.backends import cpu; print(*cpu.levels(), repr(cpu.no_amx()))"
    )
    assert said.stdout.split() == [*cpu.LEVELS, "''"], said.stderr
    done = run_python(place, *PYTEST, "-k", "amx or levels", *KERNEL_TESTS[:3])
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout_s(1800)
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    program = compiler()
    assert program is not None
    named = subprocess.run(
        [program, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(named).is_absolute():
        pytest.skip(f"{program} has no address sanitizer")
    library = build(tmp_path / "watched.so", "-DMOIETY_EMULATE_AMX", *SANITIZERS)
    place = environment(library, LD_PRELOAD=named, ASAN_OPTIONS="detect_leaks=0")
    bug = (
        "import torch; from moiety.backends import cpu; from moiety.formats import FORMATS; "
        "from moiety.formats.tiles import pack; m = cpu.Matrix(pack(torch.randn(16, 64), FORMATS['f32'])); "
        "m._as_c.row_blocks += 1; m._as_c.rows = 32; x = torch.randn(1, 64); print('started', flush=True); "
        "cpu.grouped_linear(x, m)"
    )
    harmed = run_python(place, "-c", bug)
    assert harmed.stdout == "started\n" and "AddressSanitizer" in harmed.stderr, harmed.stderr[-2000:]
    done = run_python(place, *PYTEST, "-s", *KERNEL_TESTS)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(DependencyError, match=r"none\.so"):
        cpu.library.__wrapped__()

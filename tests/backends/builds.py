"""The C kernels built in other ways than the package's own: emulated, watched by sanitizers, or with a planted bug."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moiety.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = (
    *(
        f"tests/backends/test_{name}.py"
        for name in ("cpu", "cpu_routing", "cpu_limits", "cpu_attention", "cpu_softmax")
    ),
    "tests/model/test_fused.py",
)


def compiler() -> str | None:
    """A C compiler, or None."""
    return shutil.which("gcc") or shutil.which("cc")


def build(library: Path, *flags: str, root: Path = ROOT) -> Path:
    """The sources and flags of pyproject.toml and some more flags, less optimized so that it does not take long."""
    extension = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "ext-modules"
    ][0]
    usual = [flag for flag in extension["extra-compile-args"] if not flag.startswith("-O")]
    program = compiler()
    assert program is not None

    def compile_one(source: str) -> Path:
        target = library.with_name(f"{library.name}.{Path(source).stem}.o")
        command = [program, *usual, "-O1", "-fPIC", *flags, "-c", str(root / source), "-o", str(target)]
        subprocess.run(command, check=True, timeout=600)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(compile_one, extension["sources"])]
    link = [program, "-shared", *extension["extra-link-args"], *flags, *map(str, objects), "-o", str(library)]
    subprocess.run(link, check=True, timeout=600)
    return library


def tried() -> tuple[str, ...]:
    """Levels to test: AMX in emulation, or where it is asked for, because no machine has run it yet."""
    asked = cpu.LIBRARY_VARIABLE in os.environ or os.environ.get(cpu.LEVEL_VARIABLE) == cpu.UNTRIED
    return tuple(level for level in cpu.levels() if asked or level != cpu.UNTRIED)


def run_python(
    environment: dict[str, str], *arguments: str, root: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, from the repository's root."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

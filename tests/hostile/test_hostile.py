"""Models from strangers: each is refused soon, in little memory, by an error that names the place; nothing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.hostile.make import PICKLE, Case, write_all
from tests.hostile.make_gguf import good_gguf
from tests.hostile.models import write_models

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("entry", "header", "index", "config", "gguf")
PEAK_BYTES_MAX = 512 << 20
SECONDS_MAX = 1.0


def watched(folder: Path, names: list[str], good: list[Path]) -> list[dict[str, Any]]:
    """What a program of its own that loads these saw and did."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "hostile" / "watch.py", folder, *good],
        input=json.dumps(names),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Made(NamedTuple):
    """What was written, and what a program saw and did that loaded it."""

    good: list[Path]
    cases: list[Case]
    results: list[dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("hostile")
    good = [*write_models(folder / "good"), folder / "good" / "good.gguf"]
    good[2].write_bytes(good_gguf())
    (folder / "cases").mkdir()
    cases = write_all(folder / "cases", *good[:2])
    return Made(good, cases, watched(folder / "cases", [case.path for case in cases], good))


def test_there_are_many_and_little_memory_is_needed(made: Made) -> None:
    assert len(made.cases) >= 150 and {case.group for case in made.cases} == set(GROUPS)
    peak = made.results[-1]["peak_bytes"]
    assert peak <= PEAK_BYTES_MAX, f"{peak / 1e6:.0f} MB"


def test_good_models_load(made: Made) -> None:
    for path, said in zip(made.good, made.results, strict=False):
        assert said["name"] == path.name and said["kind"] == "" and not said["events"], said


@pytest.mark.parametrize("group", GROUPS)
def test_refused_and_nothing_ran(made: Made, group: str) -> None:
    results = made.results[len(made.good) : -1]
    wrong = []
    for case, said in zip(made.cases, results, strict=True):
        assert said["name"] == case.path
        named = all(one in said["message"] for one in (case.path, case.file, case.tensor))
        refused = said["kind"] in ("FormatError", "ConfigError", "StorageError")
        fine = refused and named and said["seconds"] <= SECONDS_MAX and not said["events"]
        if case.group == group and not fine:
            wrong.append(f"{case}: {said}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


def test_the_watch_sees_what_it_should(tmp_path: Path, made: Made) -> None:
    """Code beside a good model stays where it is, and a watch that saw nothing would be no proof."""
    good = made.good[0]
    config = json.loads((good / "config.json").read_text())
    place = tmp_path / "cases" / "with-code"
    place.mkdir(parents=True)
    for file in ("model.safetensors", "generation_config.json"):
        (place / file).write_bytes((good / file).read_bytes())
    bait = "raise SystemExit('executed')\n"
    for file in (
        "modeling_x.py",
        "configuration_x.py",
        "setup.py",
        "conftest.py",
        "safetensors.py",
        "sitecustomize.py",
    ):
        (place / file).write_text(bait)
    for file in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (place / file).write_bytes(PICKLE)
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Model", "AutoConfig": "configuration_x.Config"}
    (place / "config.json").write_text(json.dumps(config))
    said = watched(tmp_path / "cases", ["with-code"], [good])[1]
    assert said["kind"] in ("", "FormatError") and not said["events"], said
    assert not list(tmp_path.rglob("executed"))

    code = """
import sys
from pathlib import Path
from tests.hostile.watch import Watch
watch = Watch(Path(sys.argv[1]))
sys.addaudithook(watch)
watch.armed = True
exec("1 + 1")
open("/etc/hostname").close()
open(sys.argv[1] + "/inside", "w").close()
open(sys.argv[1] + "/config.json").close()
__import__("this")
watch.armed = False
print([one.split(" ")[0] for one in watch.events], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, place],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    seen = done.stderr.splitlines()[-1]
    assert all(word in seen for word in ("compile", "exec", "import", "open")), seen
    assert seen.count("'open'") >= 2

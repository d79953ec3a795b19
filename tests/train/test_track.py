"""Where the numbers of a run go, and what happens when they cannot."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moiety.errors import DependencyError, UsageError
from moiety.train.data import TokenData
from moiety.train.track import TRACKERS, JsonLines, open_trackers, values_of
from tests.train import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return tiny.text(tmp_path_factory.mktemp("tokens"))[0]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, *steps: int) -> None:
    lines = JsonLines(path)
    for step in steps:
        lines.log(step, {"loss": 1 / step})
    lines.close()


def test_one_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log(1, {"loss": 0.5})
    assert _lines(path) == [{"step": 1, "loss": 0.5}], "a line is on disk as soon as it is logged"
    lines.log(2, {"loss": 0.25, "layer_0/max_vio": 1.5})
    lines.close()
    assert _lines(path)[1] == {"step": 2, "loss": 0.25, "layer_0/max_vio": 1.5}


@pytest.mark.parametrize("after", [1, 3, 5, 9])
def test_resume_cuts_what_came_after(after: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 1, 2, 3, 4, 5)
    lines = JsonLines(path, after_step=after)
    lines.log(after + 1, {"loss": 9.0})
    lines.close()
    assert [line["step"] for line in _lines(path)] == [*range(1, min(after, 5) + 1), after + 1]
    assert _lines(path)[-1]["loss"] == 9.0


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 1, 2)
    JsonLines(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("cut", [1, 2, 10, 20])
def test_a_half_written_last_line_is_cut(cut: int, tmp_path: Path) -> None:
    """The power went in the middle of line 3; line 3 is written again or dropped, never half kept."""
    path = tmp_path / "metrics.jsonl"
    _write(path, 1, 2, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    lines = JsonLines(path, after_step=3)
    lines.log(4, {"loss": 4.0})
    lines.close()
    steps = [line["step"] for line in _lines(path)]
    assert steps in ([1, 2, 4], [1, 2, 3, 4]), steps


def test_rubbish_in_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 1, 2)
    path.write_bytes(b'\xff\xfe\n[1]\n"step"\n{"no": "step"}\n\n' + path.read_bytes())
    JsonLines(path, after_step=2).close()
    assert [line["step"] for line in _lines(path)] == [1, 2]


def test_values_of_a_record(data: TokenData) -> None:
    net = tiny.model(300)
    first, last = tiny.run(net, data, tiny.options(steps=2))
    values = values_of(first)
    assert values["loss"] == first.loss and values["tokens_seen"] == 8 * tiny.LENGTH
    assert values["balance_loss"] == first.balance_loss and values["learning_rate"] == first.learning_rate
    assert values["layer_1/max_vio"] == first.health[1].max_vio and values["skipped_steps"] == 0
    assert not any(name.startswith("bits_per_byte") for name in values)
    assert last.evaluation is not None
    found = {name: value for name, value in values_of(last).items() if name.startswith("bits_per_byte")}
    assert found == {
        "bits_per_byte/mean": last.evaluation.mean_bits_per_byte,
        "bits_per_byte/animals": last.evaluation.bits_per_byte["animals"],
        "bits_per_byte/code": last.evaluation.bits_per_byte["code"],
    }
    assert all(type(value) is float for value in values.values())


def test_what_is_not_finite_is_left_out(data: TokenData) -> None:
    net = tiny.model(300)
    poison = tiny.Poison(frozenset({1}))
    tiny.poison_loss(net, poison)
    from moiety.train.loop import train

    _, bad, _ = poison.over(train(net, data, tiny.options(steps=3)))
    assert bad.skipped and math.isnan(bad.loss)
    values = values_of(bad)
    assert all(math.isfinite(value) for value in values.values())
    assert "loss" not in values and "gradient_norm" not in values and values["skipped_steps"] == 1


def test_a_dense_run_has_no_router_numbers(data: TokenData) -> None:
    (record,) = tiny.run(tiny.model(300, experts=0), data, tiny.options(steps=1))
    names = values_of(record)
    assert "balance_loss" not in names and not any(name.startswith("layer_") for name in names)


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mlflow") as caught:
        open_trackers(("mlflow",), tmp_path)
    assert caught.value.hint is not None and all(name in caught.value.hint for name in TRACKERS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_its_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_import = importlib.import_module

    def no_trackers(module: str, package: str | None = None) -> ModuleType:
        if module.rpartition(".")[2] in TRACKERS:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return true_import(module, package)

    monkeypatch.setattr(importlib, "import_module", no_trackers)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DependencyError, match=name) as caught:
        open_trackers((name,), tmp_path)
    assert caught.value.hint is not None and "pip install" in caught.value.hint
    assert "moiety[track]" in caught.value.hint and caught.value.exit_code == 3
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n', "nothing was cut for a failed start"


def test_wandb_and_trackio_get_each_step_and_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio"):
        calls: list[tuple[Any, ...]] = []
        fake = SimpleNamespace(
            init=lambda calls=calls, **given: calls.append(("init", given["project"], given["name"])),
            log=lambda values, step, calls=calls: calls.append(("log", step, values)),
            finish=lambda calls=calls: calls.append(("finish",)),
        )
        monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
        (tmp_path / name).mkdir()
        opened = open_trackers((name,), tmp_path / name)
        assert len(opened) == 2
        for tracker in opened:
            tracker.log(7, {"loss": 0.5})
            tracker.close()
        assert calls == [("init", "moiety", name), ("log", 7, {"loss": 0.5}), ("finish",)]
        assert _lines(tmp_path / name / "metrics.jsonl") == [{"step": 7, "loss": 0.5}]


def test_tensorboard_gets_each_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            scalars.append((folder, 0.0, 0))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def close(self) -> None:
            scalars.append(("closed", 0.0, 0))

    monkeypatch.setitem(
        sys.modules,
        "torch.utils.tensorboard",
        SimpleNamespace(SummaryWriter=Writer),  # type: ignore[arg-type]
    )
    for tracker in open_trackers(("tensorboard",), tmp_path):
        tracker.log(3, {"loss": 0.5, "z_loss": 2.0})
        tracker.close()
    assert scalars == [
        (str(tmp_path / "tensorboard"), 0.0, 0),
        ("loss", 0.5, 3),
        ("z_loss", 2.0, 3),
        ("closed", 0.0, 0),
    ]

"""`moiety finetune`: what it says before, while and after, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moiety.cli import main
from tests.train.chatting import chat, lines, model


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    torch.manual_seed(0)
    values = [{"messages": chat(f"say {n}", "uno due"), "id": n} for n in range(12)]
    return str(model(tmp_path / "parent")), lines(tmp_path / "chats.jsonl", values)


FAST = ("--batch", "2", "--length", "60", "--learning-rate", "0.003", "--held-out", "0.3")


def test_a_dry_run_shows_what_is_learnt(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, data = files
    arguments = ["finetune", parent, "--data", data, "--out", str(tmp_path / "run"), "--dry-run", *FAST]
    assert main([*arguments, "--train", "experts=0.01", "--train", "router"]) == 0
    said = capsys.readouterr().err
    assert "12 lines have a key 'id', which is not used" in said
    assert "say 0<|im_end|>\n<|im_start|>assistant\n[[uno due<|im_end|>]]" in said
    assert "routers are trained; balance loss: 0.01" in said
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert "0.01" in rows["experts"] and "0.003" in rows["router"] and "frozen" in rows["attention"]
    assert not (tmp_path / "run").exists()


def test_a_run_and_going_on_with_it(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, data = files
    out = str(tmp_path / "run")
    assert main(["finetune", parent, "--data", data, "--out", out, "--epochs", "4", "--json", *FAST]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["done"] and found["step"] > 2 and found["run"] == out and found["preferred"] == {}
    assert set(found["held_out"]) == {"chats"} and found["held_out"]["chats"] > 0
    assert main(["finetune", "--resume", "--out", out]) == 0
    assert f"moiety chat {out}" in capsys.readouterr().out
    assert main(["finetune", parent, "--data", data, "--out", out]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", out]) == 2
    assert "moiety finetune --resume" in capsys.readouterr().err


def test_an_adapter(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent, data = files
    out = tmp_path / "run"
    words = [
        "finetune",
        parent,
        "--data",
        data,
        "--out",
        str(out),
        "--train",
        "adapters",
        "--lora.rank",
        "3",
        *FAST,
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"moiety chat {parent} --adapter {out}/checkpoints/step-" in said
    folder = said.strip().rpartition(" ")[2]
    assert json.loads((Path(folder) / "adapter_config.json").read_text())["r"] == 3
    assert main(["adapter", "check", parent, folder, "--json", "--prompt", "say 1 uno due"]) in (0, 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of a model and --resume"),
        (["PARENT", "--resume"], "one of a model and --resume"),
        (["--resume", "--epochs", "2"], "one of a model and --resume"),
        (["--resume", "--lora.rank", "2"], "one of a model and --resume"),
        (["PARENT"], "nothing to train on"),
        (["PARENT", "--data", "none.jsonl"], "cannot read none.jsonl"),
        (["PARENT", "--data", "DATA", "--train", "heads"], "train names 'heads'"),
        (["PARENT", "--data", "DATA", "--turns", "first"], "first"),
    ],
)
def test_refusals(
    words: list[str], said: str, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"PARENT": files[0], "DATA": files[1]}
    asked = ["finetune", *(names.get(word, word) for word in words), "--out", str(tmp_path / "run")]
    assert main(asked) in (1, 2) and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

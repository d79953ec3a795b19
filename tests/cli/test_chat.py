"""`moiety chat`: lines in, continuations out, and every way of ending it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from moiety.model import checkpoint
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer
from tests.cli.conftest import Call


def _type(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_each_line_is_answered_until_the_input_ends(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _type(monkeypatch, "the cat\nx = 3\n")
    said = call("chat", trained, "--max-tokens", 8, "--temperature", 0)
    assert said.code == 0 and said.out.count("\n") >= 2
    _type(monkeypatch, "the cat\nx = 3\n")
    assert call("chat", trained, "--max-tokens", 8, "--temperature", 0).out == said.out


def test_options_of_the_engine(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _type(monkeypatch, "the cat\n")
    assert call("chat", trained, "--max-tokens", 3, "--kv-dtype", "bf16", "--draft", 2).code == 0
    call("chat", trained, "--kv-dtype", "fp7").assert_refused(2, "kv_dtype is 'fp7'")
    call("chat", trained, "--plain", "--draft", 2).assert_refused(2, "--plain has no engine")


def test_an_empty_line_ends(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outs = []
    for text in ("the cat\n\nnever read\n", "the cat\n"):
        _type(monkeypatch, text)
        said = call("chat", trained, "--max-tokens", 6, "--temperature", 0)
        assert said.code == 0
        outs.append(said.out)
    assert outs[0] == outs[1]
    _type(monkeypatch, "")
    said = call("chat", trained)
    assert said.code == 0 and said.out.strip() == ""


def test_more_than_the_model_can_see(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transcript is cut from its start; more tokens than positions are no crash."""
    _type(monkeypatch, "the cat sat on the mat and saw birds again and again\n" * 4)
    assert call("chat", trained, "--max-tokens", 20).code == 0
    _type(monkeypatch, "the cat\n")
    assert call("chat", trained, "--max-tokens", 100).code == 0


def test_ctrl_c_ends(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupting())
    said = call("chat", trained)
    assert said.code in (0, 130)


def test_nothing_to_open(call: Call, tmp_path: Path) -> None:
    said = call("chat", tmp_path / "absent")
    assert said.code in (1, 2)
    said.assert_refused(said.code, "absent")


def test_a_model_with_a_template(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = (trained / "checkpoints").iterdir()
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    tokenizer = Tokenizer.load(folder)
    tokenizer.chat_template = ChatTemplate(template)
    checkpoint.save(checkpoint.load(folder), tmp_path / "model", tokenizer=tokenizer)
    _type(monkeypatch, "the\n")
    said = call("chat", tmp_path / "model", "--max-tokens", 4, "--temperature", 0, "--system", "a")
    assert said.code == 0 and said.out.endswith("\n") and "not taught" not in said.err
    _type(monkeypatch, "the cat\n")
    call("chat", trained, "--system", "be brief").assert_refused(2, "no chat template")

"""`moiety doctor`: what is here, what is used, and what is missing with the command that mends it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from moiety import backends
from tests.cli.conftest import Call


def test_json_says_what_is_so(call: Call) -> None:
    said = call("doctor", "--json")
    assert said.code == 0 and said.err == ""
    facts = said.json
    assert facts["torch"] == torch.__version__ and facts["cores"] == torch.get_num_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        choice = backends.choose("auto", device, dtype)
        assert facts["experts"][name]["name"] == choice.name and facts["experts"][name]["reason"]
    for package, there in facts["extras"].items():
        assert there == (importlib.util.find_spec(package) is not None), package


@pytest.mark.parametrize("columns", [40, 100])
def test_words(columns: int, call: Call) -> None:
    said = call("doctor", columns=columns)
    assert said.code == 0 and said.err == ""
    flat = " ".join(said.out.split())
    assert torch.__version__ in flat and "grouped" in flat
    table = said.out.partition("not installed")[0].partition("every optional")[0]
    assert max(map(len, table.splitlines())) <= columns


def test_what_is_missing_is_named_with_its_command(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = call("doctor")
    assert said.code == 0
    for package in ("plotly", "chatterbot_corpus", "datasets", "tensorboard", "wandb", "trackio"):
        (line,) = [line for line in said.out.splitlines() if line.startswith(f"not installed: {package}")]
        assert "pip install 'moiety[" in line
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "every optional package is installed" in call("doctor").out

"""`moiety demo`, small: everything it promises is there, and the checkpoint is one that others read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiety.cli import main
from moiety.infer.open import open_model
from tests.cli.conftest import Call

WORDS = [
    *("--steps", "4", "--bytes-per-domain", "60000", "--vocab-size", "400"),
    *("--d-model", "48", "--layers", "2", "--d-ff", "32"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder, stdout and stderr of one small demo."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("demo")
    said, talk = io.StringIO(), io.StringIO()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(talk),
    ):
        patch.setattr("moiety.train.host.keep_freed_memory", lambda: True)
        patch.setenv("COLUMNS", "100")
        code = main(["demo", *WORDS, "--out", str(out)])
    torch.set_num_threads(before)
    assert code == 0, talk.getvalue()
    return out, said.getvalue(), talk.getvalue()


def test_the_summary_is_on_stdout(demo: tuple[Path, str, str]) -> None:
    out, said, talk = demo
    for row in ("parameters, total", "parameters, active", "bits/byte, mean", "training, tokens/s"):
        assert row in said, row
    assert "MoE" in said and "dense twin" in said and "arithmetic" in said
    assert str(out / "report.html") in said and f"moiety generate {out}/moe" in said
    assert "step 4" in talk and "step 4" not in said
    assert "\x1b" not in said + talk


def test_the_report_is_there_and_asks_nobody(demo: tuple[Path, str, str]) -> None:
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert len(page) > 100_000 and page.lstrip().lower().startswith("<!doctype html")
    assert '<script src="http' not in page and '<link rel="stylesheet" href="http' not in page
    assert "moiety demo" in page and "arithmetic" in page


def test_transformers_reads_the_checkpoint(demo: tuple[Path, str, str]) -> None:
    import transformers

    opened = open_model(demo[0] / "moe")
    theirs = transformers.MixtralForCausalLM.from_pretrained(opened.path, dtype=torch.float32).eval()
    ids = torch.tensor([opened.tokenizer.encode("def area(width):\n    return width\n")])
    with torch.no_grad():
        ours_BSV, theirs_BSV = opened.model(ids).logits, theirs(ids).logits
    assert ours_BSV.shape == theirs_BSV.shape and float(theirs_BSV.std()) > 0.01
    torch.testing.assert_close(ours_BSV, theirs_BSV, rtol=1e-5, atol=1e-5)


def test_both_twins_can_be_generated_from(demo: tuple[Path, str, str], call: Call) -> None:
    for name in ("moe", "dense"):
        said = call("generate", demo[0] / name, "import ", "--max-tokens", 4)
        assert said.code == 0 and "4 tokens" in said.err


@pytest.mark.parametrize("columns", [40])
def test_the_second_time_reuses_the_tokens(columns: int, demo: tuple[Path, str, str], call: Call) -> None:
    out = demo[0]
    kept = {
        path: path.stat().st_mtime_ns
        for folder in ("tokens", "tokenizer")
        for path in (out / folder).rglob("*")
        if path.is_file()
    }
    report = (out / "report.html").stat().st_mtime_ns
    assert len(kept) > 5
    words = ["--steps", "2", *WORDS[2:]]
    said = call("demo", *words, "--out", out, columns=columns)
    assert said.code == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert (out / "report.html").stat().st_mtime_ns > report
    table = said.out.partition("router:")[0].partition("held-out text")[2]
    assert "bits/byte, mean" in table


def test_steps_must_be_positive(call: Call, tmp_path: Path) -> None:
    said = call("demo", "--steps", 0, *WORDS[2:], "--out", tmp_path / "run")
    said.assert_refused(2, "steps")
    assert not (tmp_path / "run").exists(), "refused before any text is read"


def test_a_dense_demo_makes_no_sense(call: Call, tmp_path: Path) -> None:
    call("demo", *WORDS, "--experts", 0, "--out", tmp_path).assert_refused(2, "dense", hint="experts")

"""`moiety plan`: advice first, tables that fit, JSON for scripts, a page, profiles, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moiety.infer import limits
from moiety.model import checkpoint
from moiety.plan.profile import append_history, default_path, read_history, write_profile
from moiety.quant.quantize import policy_named, quantize
from tests import tiny
from tests.cli.conftest import Call
from tests.plan.profiles import made


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return default_path()


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_advice_comes_first_and_tables_fit(columns: int, call: Call) -> None:
    said = call("plan", "mixtral-8x7b", "--device", "pc-64", "--memory", "12GiB", columns=columns)
    assert said.code == 0 and said.err == ""
    text = " ".join(said.out.split())
    assert text.startswith("fits in 12.0 GiB at int4-g32 with ") and "limited by disk" in text
    for words in ("46.7B parameters, 12.9B active", "27.58 %", "tokens/s", "rule of thumb", "llama-server"):
        assert words in text, words
    tables = said.out.partition("llama.cpp:")[0]
    assert max(map(len, tables.splitlines())) <= columns


def test_json_has_decimal_gigabytes_by_format(call: Call) -> None:
    said = call("plan", "deepseek-v3", "--device", "h100", "--devices", 16, "--json")
    assert said.code == 0 and said.err == ""
    assert said.json["weight_gigabytes"]["bf16"] == pytest.approx(1342.05, abs=0.01)
    assert {
        "advice",
        "layouts",
        "batches",
        "cost",
        "flags",
        "flops",
        "router",
        "warnings",
    } <= said.json.keys()


def test_planning_a_known_model_loads_no_torch() -> None:
    code = (
        "import sys; from moiety.cli import main; main(['plan', 'mixtral-8x7b', '--device', 'l4', '--json'])"
    )
    code += "; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0 and json.loads(done.stdout)["name"] == "mixtral-8x7b", done.stderr


def test_everything_that_can_be_asked_for(call: Call) -> None:
    words = ["--device", "h800", "--devices", 2048, "--train-tokens", "14.8T", "--capacity-factor", 1.25]
    words += ["--ranks", 8, "--against", "llama-3-70b", "--price", 2, "--tokens-per-s", 20, "--format", "fp8"]
    text = " ".join(call("plan", "deepseek-v3", *words).out.split())
    for part in (
        "training on 14.8T",
        "device hours",
        "capacity 1.25",
        "dropless",
        "over 8 ranks",
        "against llama-3-70b",
    ):
        assert part in text, part
    for part in (
        "46.8 % of the FLOPs saved",
        "cost: ",
        "listed: gpt-4-turbo 10 in, 30 out",
        "0.0159 % of all",
    ):
        assert part in text, part
    claim = call(
        "plan", "llama-3-70b", "--device", "h100", "--format", "bf16", "--tokens-per-s", 80, "--price", 2
    )
    text = " ".join(claim.out.split())
    assert "warning: 80 tokens/s is above the roofline" in text and "6.94e-06 dollars a token" in text
    assert "does not fit" in text and "2 hold it" in text


def test_switch_transformers_are_counted(call: Call) -> None:
    said = call("plan", "switch-base-8", "--device", "l4")
    assert said.code == 0 and "encoder-decoder" in said.out and "weights alone" in said.out
    call("plan", "switch-base-8", "--plot", "p.html").assert_refused(2, "nothing to plot")


def test_folders_and_files(call: Call, tmp_path: Path, trained: Path) -> None:
    (folder,) = (trained / "checkpoints").iterdir()
    said = call("plan", folder, "--json", "--context", 16, "--prompt", 8)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert said.code == 0, said.err
    assert [one["format"] for one in said.json["layouts"]] == ["as stored"]
    assert said.json["layouts"][0]["memory"]["weights"] == size
    model = tiny.model("mixtral").eval()
    quantize(model, policy_named("int8-g32"))
    checkpoint.save(model, tmp_path / "packed")
    said = call("plan", tmp_path / "packed", "--json", "--context", 16, "--prompt", 8)
    assert said.code == 0 and said.json["layouts"][0]["format"] == "as stored", said.err
    other = call("plan", tmp_path / "packed", "--json", "--format", "bf16", "--context", 16, "--prompt", 8)
    assert other.json["layouts"][0]["format"] == "bf16"


def test_a_page(call: Call, tmp_path: Path) -> None:
    said = call("plan", "olmoe-1b-7b", "--device", "l4", "--plot", tmp_path / "plan.html")
    assert said.code == 0 and "plan.html is written" in said.err
    page = (tmp_path / "plan.html").read_text()
    assert "olmoe-1b-7b" in page and "activations" in page and "tokens per second" in page


def test_this_machine_by_its_profile(call: Call, cache: Path) -> None:
    assert "not measured" in call("plan", "olmoe-1b-7b").out
    write_profile(made(), cache)
    said = call("plan", "olmoe-1b-7b", "--json")
    assert said.json["device"]["measured"] and said.json["device"]["date"] == "2026-01-02 03:04"
    other = cache.with_name("other.json")
    write_profile(made(memory_bytes=8 * 10**9), other)
    assert call("plan", "olmoe-1b-7b", "--json", "--profile", other).json["device"]["memory_bytes"] == 8e9
    cache.write_text("{}")
    call("plan", "olmoe-1b-7b").assert_refused(1, "version", "--measure")
    assert call("plan", "olmoe-1b-7b", "--device", "l4").code == 0, "another device needs no profile"


@pytest.mark.parametrize("columns", [40, 100])
def test_measuring_writes_the_profile(
    columns: int, call: Call, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, bool]] = []

    def measure(make: object, folder: Path, say: object, *, quick: bool) -> object:
        asked.append((folder, quick))
        return made()

    monkeypatch.setattr(limits, "measure", measure)
    said = call("plan", "--measure", "--quick", "--disk", tmp_path, columns=columns)
    assert said.code == 0 and asked == [(tmp_path, True)] and str(cache) in said.err.replace("\n", "")
    assert "GB/s" in said.out and "Gop/s" in said.out and max(map(len, said.out.splitlines())) <= columns
    assert call("plan", "--measure", "--json").json["path"] == str(cache)
    assert call("plan", "olmoe-1b-7b", "--json").json["device"]["measured"]


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ((), 2, "a model to plan for"),
        (("olmoe-1b-7b", "--quick"), 2, "--quick"),
        (("olmoe-1b-7b", "--measure"), 2, "--measure"),
        (("--measure", "--disk", "/no/such/folder"), 2, "/no/such/folder"),
        (("no-such-model",), 2, "no-such-model"),
        (("gpt-4",), 2, "undisclosed"),
        (("olmoe-1b-7b", "--device", "h1000"), 2, "h1000"),
        (("olmoe-1b-7b", "--memory", "a lot"), 2, "a lot"),
        (("olmoe-1b-7b", "--format", "int5"), 2, "int5"),
        (("olmoe-1b-7b", "--against", "nobody-7b"), 2, "nobody-7b"),
        (("olmoe-1b-7b", "--profile", "/no/profile.json"), 1, "/no/profile.json"),
    ],
)
def test_refusals(words: tuple[str, ...], code: int, named: str, call: Call) -> None:
    call("plan", *words).assert_refused(code, named)


def test_a_bench_against_its_plan(call: Call, trained: Path, cache: Path) -> None:
    words = ("bench", trained, "--batches", "1,2", "--prompt", 3, "--tokens", 3, "--prefill", 7, "--plan")
    said = call(*words)
    assert said.code == 0 and "against the plan: decode, batch 1" in said.err and "not measured" in said.err
    assert read_history(cache) == []
    write_profile(made(), cache)
    said = call(*words, "--json")
    assert said.code == 0 and said.json["decode"] and "prefill 7" in said.err
    (line,) = read_history(cache)
    assert [one["what"] for one in line["verdicts"]] == ["decode, batch 1", "decode, batch 2", "prefill 7"]
    assert line["case"]["kv_dtype"] == "fp32" and all(one["measured"] > 0 for one in line["verdicts"])


def test_an_answer_against_its_plan(call: Call, trained: Path, cache: Path) -> None:
    write_profile(made(), cache)
    append_history({"earlier": 1}, cache)
    said = call("generate", trained, "the", "--max-tokens", 6, "--plan")
    assert said.code == 0 and "against the plan: memory" in said.err and "prefill" in said.err, said.err
    line = read_history(cache)[-1]
    assert line["verdicts"][0]["what"] == "memory" and line["verdicts"][0]["measured"] > 1e7
    for extra in (("--plain",), ("--n", "2")):
        call("generate", trained, "the", "--plan", *extra).assert_refused(2, "--plan")


def test_the_profile_is_json_that_people_can_read(cache: Path) -> None:
    write_profile(made(), cache)
    assert json.loads(cache.read_text())["disk_note"] == "nowhere"

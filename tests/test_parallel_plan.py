"""The page of clusters: every published run with its error, and what the bench of all-to-alls recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import parallel_plan

ROOT = Path(__file__).resolve().parents[1]


def test_published_figures() -> None:
    """54 days on 2,048 H800, 180 thousand hours for a trillion tokens; TFLOP/s become tokens by our own count."""
    published, band, middle, parts = parallel_plan.foretold(parallel_plan.RUNS[0])
    assert parallel_plan.TOKENS / published / 2048 / 86_400 == pytest.approx(54.2, abs=0.05)
    assert 1e12 / published / 3600 == pytest.approx(180e3, rel=0.001)
    assert band.low < published < band.high and band.low < middle < band.high
    assert set(parts) >= {"step_seconds", "exchange_seconds", "gradient_seconds"}
    qwen = next(run for run in parallel_plan.RUNS if run.tera == 240.5)
    rate = parallel_plan.foretold(qwen)[0]
    assert rate == pytest.approx(12_040 * 240.5 / 277, rel=0.1), (
        "NeMo Automodel has 277 TFLOP/s for 12,040 tokens/s"
    )


def test_every_run_is_a_row_with_its_error() -> None:
    text = parallel_plan.page()
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 9][1:]
    assert len(rows) == len(parallel_plan.RUNS)
    for run, row in zip(parallel_plan.RUNS, rows, strict=True):
        published, band, middle, _ = parallel_plan.foretold(run)
        assert f"| {middle / published - 1:+.0%} |" in row and f"| {published:,.0f} |" in row
        assert ("| yes |" in row) == (band.low <= published <= band.high)
    inside = sum("| yes |" in row for row in rows)
    assert f"{inside} of {len(rows)} are inside" in text and "Between processes" not in text


def test_the_bench_is_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "host": "2 cores",
        "links": {"2": {"latency_s": 2e-5, "bytes_per_s": 1.5e9}},
        "errors": {"2 ranks, sizes not fitted": {"mean": 0.123, "largest": 0.2, "sizes": 3}},
    }
    file = tmp_path / "alltoall.json"
    file.write_text("more\n" + json.dumps(found) + "\n")
    assert parallel_plan.main(file) == 0
    said = capsys.readouterr().out
    assert "| 2 ranks, sizes not fitted | 3 | 12% | 20% |" in said and "20 us a message and 1.50 GB/s" in said


def test_the_page_in_docs_is_what_the_tool_prints() -> None:
    results = parallel_plan.RESULTS
    recorded = json.loads(results.read_text().splitlines()[-1]) if results.is_file() else None
    assert (ROOT / "docs" / "parallel-plan.md").read_text() == parallel_plan.page(recorded) + "\n"

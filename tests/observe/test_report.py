"""The report: one file, no network, nothing of the data ever markup, and sentences that the numbers allow."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moiety.errors import DependencyError, StorageError, UsageError
from moiety.observe.findings import compare, domain_sentence, equal_time_sentence, headline, short_number
from moiety.observe.report import (
    EvaluationPoint,
    ExpertTokens,
    Generation,
    ReportData,
    RoutedText,
    RoutedToken,
    TrainingPoint,
    write_report,
)
from moiety.observe.stats import specialization_of_counts
from tests.observe import sample_report as sample

SECTIONS = {
    "learning",
    "domains",
    "load",
    "specialisation",
    "routed",
    "vocabulary",
    "samples",
    "numbers",
    "caveats",
    "glossary",
}
EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>{{data}}&amp;'


class Page(HTMLParser):
    """Elements with their attributes, visible text, and what the script elements hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def ids(self) -> set[str]:
        return {str(attributes["id"]) for _, attributes in self.elements if "id" in attributes}


def page_of(data: ReportData, folder: Path) -> Page:
    write_report(folder / "report.html", data)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(sample.sample_report(), tmp_path_factory.mktemp("report"))


def test_all_sections_are_there(page: Page) -> None:
    sections = {attributes["id"] for tag, attributes in page.elements if tag == "section"}
    assert sections == SECTIONS
    assert "{{" not in page.text
    for words in (
        "Reproduce it",
        "MaxVio",
        "Largest load",
        "These are tiny models",
        "moiety compare --seed 0",
    ):
        assert words in page.text
    chart = json.loads(page.scripts[1])
    assert [run["name"] for run in chart["runs"]] == ["MoE, 8 experts, 2 active", "dense twin"]
    assert len(chart["health"]["load"]) == len(chart["health"]["steps"]) == 20
    assert chart["specialisation"]["layers"] == [0, 1, 2, 3]


def test_every_link_and_label_has_its_target(page: Page) -> None:
    ids = page.ids()
    for _, attributes in page.elements:
        link = attributes.get("href")
        if link is not None:
            assert link[0] == "#" and link[1:] in ids, link
    asked = set(re.findall(r'\$\("([\w-]+)"\)', page.scripts[2]))
    assert asked and asked <= ids, asked - ids


def test_nothing_is_loaded_from_anywhere(page: Page, tmp_path: Path) -> None:
    assert len(page.scripts) == 3
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "img"}
        assert "src" not in attributes and "srcset" not in attributes
    policy = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1 and str(policy[0]).startswith("default-src 'none'")
    write_report(tmp_path / "report.html", sample.sample_report())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    ours = text.replace(page.scripts[0], "")
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|WebSocket", ours)
    assert (tmp_path / "report.html").stat().st_size < 8_000_000


def test_pictures_have_words(page: Page) -> None:
    plots = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(plots) == 5
    assert all(len(str(attributes["aria-label"])) > 40 for attributes in plots)
    captions = sum(tag == "figcaption" for tag, _ in page.elements)
    assert captions >= 5
    tokens = [a for _, a in page.elements if a.get("class") == "token"]
    assert [a["tabindex"] for a in tokens].count("0") == 1  # one stop; arrow keys do the rest


def test_text_from_data_is_never_markup(tmp_path: Path) -> None:
    plain = sample.sample_report()
    runs = tuple(
        dataclasses.replace(
            run,
            name=EVIL + run.kind,
            final_bits_per_byte={EVIL: 2.0, "code": 1.5},
            evaluation=tuple(EvaluationPoint(step=s, domain=EVIL, bits_per_byte=2.0) for s in (10, 20)),
        )
        for run in plain.runs
    )
    evil = dataclasses.replace(
        plain,
        title=EVIL,
        host=EVIL,
        command=EVIL,
        runs=runs,
        corpus=(dataclasses.replace(plain.corpus[0], name=EVIL),),
        specialization=specialization_of_counts(np.array([[[9, 1], [1, 9]]]), [EVIL, "code"], shuffles=20),
        top_tokens=(ExpertTokens(layer=0, expert=0, tokens=((EVIL, 0.5, 100),)),),
        routed_text=RoutedText(layers=(0,), tokens=(RoutedToken(text=EVIL, choices_L=(((0, 1.0),),)),)),
        generations=(Generation(run=EVIL, prompt=EVIL, text=EVIL + "\ud800"),),
        notes=(EVIL,),
    )
    page = page_of(evil, tmp_path)
    assert len(page.scripts) == 3
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert page.text.count(EVIL) >= 10
    chart = json.loads(page.scripts[1])
    assert "<" not in page.scripts[1] and chart["routed"]["tokens"] == [EVIL]
    assert all("<" not in name for name in [*chart["domains"], *(run["name"] for run in chart["runs"])])


def test_missing_parts_leave_no_trace(tmp_path: Path) -> None:
    (run,) = sample.sample_report().runs[1:]
    page = page_of(ReportData(title="One", host="h", command="c", runs=(run,)), tmp_path)
    sections = {attributes["id"] for tag, attributes in page.elements if tag == "section"}
    assert sections == {"learning", "domains", "numbers", "caveats", "glossary"}
    shown = [a for tag, a in page.elements if tag == "a" and "hidden" not in a]
    assert {str(a["href"])[1:] for a in shown} == sections
    assert all(str(a["href"])[1:] in page.ids() for tag, a in page.elements if tag == "a")
    assert json.loads(page.scripts[1])["pair"] is None


def test_not_a_number_is_a_gap(tmp_path: Path) -> None:
    plain = sample.sample_report()
    bad = dataclasses.replace(
        plain.runs[0], training=(TrainingPoint(step=1, tokens=9, loss=math.nan, seconds=0.1),)
    )
    page = page_of(dataclasses.replace(plain, runs=(bad, plain.runs[1])), tmp_path)
    series = json.loads(page.scripts[1])["runs"][0]["series"]
    assert series["training loss (nats per token)"]["bits"] == [None]


def test_a_deep_model_shows_some_layers(tmp_path: Path) -> None:
    counts_LDE = np.random.default_rng(0).integers(50, 100, (48, 2, 64))
    found = specialization_of_counts(counts_LDE, ["a", "b"], shuffles=20)
    data = sample.sample_report(changes={"specialization": found, "health": sample.health(48, 64)})
    page = page_of(data, tmp_path)
    assert sum(a.get("class") == "heat" for _, a in page.elements) == 12
    assert "12 of 48 layers are shown." in page.text
    assert json.loads(page.scripts[1])["specialisation"]["shuffled"] is None
    assert "no baseline of shuffled" in page.text and "The bar" not in page.text


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one run"):
        write_report(tmp_path / "r.html", ReportData(title="", host="", command="", runs=()))


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the page before", encoding="utf-8")
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(DependencyError, match="pip install 'moiety\\[report\\]'"):
        write_report(path, sample.sample_report())
    assert path.read_text(encoding="utf-8") == "the page before"


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(path, sample.sample_report())
    write_report(path, sample.sample_report(moe=1.1))
    assert "worse" in path.read_text(encoding="utf-8")
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(path / "report.html", sample.sample_report())


# The sentences


@pytest.mark.parametrize(
    ("moe", "dense", "words"),
    [
        (0.90, 1.0, "% better, in 1.2× the time."),
        (1.10, 1.0, "% worse, in 1.2× the time."),
        (1.0052, 1.0, ": no clear difference, in 1.2× the time."),
    ],
)
def test_headline(moe: float, dense: float, words: str) -> None:
    data = sample.sample_report(moe=moe, dense=dense)
    found = compare(data)
    assert found is not None
    text = headline(data)
    assert text.startswith("At equal active parameters and equal tokens, the MoE reached ")
    assert f"{found.moe_bits:.2f} bits/byte against the dense twin's {found.dense_bits:.2f}" in text
    assert text.endswith(words), text


def test_headline_says_what_is_not_equal() -> None:
    moe = sample.run("moe", 0.9, active=2_000_000, tokens=4096)
    data = sample.sample_report(changes={"runs": (moe, sample.run("dense", 1.0))})
    assert "At 2 M active parameters against 1.24 M and 1.64 M tokens against 819 k, " in headline(data)
    assert headline(data).endswith("better, in about the same time.")


def test_headline_of_one_run_and_of_none_evaluated() -> None:
    dense = sample.run("dense", 1.0)
    alone = sample.sample_report(changes={"runs": (dense,)})
    assert headline(alone) == "dense twin reached 1.93 bits/byte on held-out text."
    assert compare(alone) is None and equal_time_sentence(alone) == ""
    blank = dataclasses.replace(dense, final_bits_per_byte={}, evaluation=())
    assert "nothing was evaluated" in headline(sample.sample_report(changes={"runs": (blank,)}))


def straight(kind: str, *, step_s: float, final: float, steps: int = 10) -> object:
    """A run whose single domain falls on a straight line from 3 at step 0 to `final`."""
    return dataclasses.replace(
        sample.run(kind, 1.0),
        training=tuple(
            TrainingPoint(step=s, tokens=100 * s, loss=1.0, seconds=step_s * s) for s in range(1, steps + 1)
        ),
        evaluation=tuple(
            EvaluationPoint(step=s, domain="a", bits_per_byte=3 + (final - 3) * s / steps)
            for s in range(0, steps + 1, 5)
        ),
        final_bits_per_byte={"a": final},
    )


def test_equal_time_is_read_off_the_slower_curve() -> None:
    slow, fast = straight("moe", step_s=2.0, final=1.0), straight("dense", step_s=1.0, final=2.0)
    data = sample.sample_report(changes={"runs": (slow, fast)})
    found = compare(data)
    assert found is not None and found.equal_time is not None
    assert found.equal_time.seconds == 10.0
    assert found.equal_time.moe_bits == pytest.approx(2.0)  # half its way from 3 to 1
    assert found.equal_time.dense_bits == 2.0
    assert "50.0% better, in 2.0× the time" in headline(data)
    assert equal_time_sentence(data).endswith(
        "10 seconds of training instead, it is 2.00 against 2.00: no clear difference."
    )


def test_no_equal_time_without_curves() -> None:
    runs = tuple(
        dataclasses.replace(run, evaluation=run.evaluation[-5:]) for run in sample.sample_report().runs
    )
    data = sample.sample_report(changes={"runs": runs})
    found = compare(data)
    assert found is not None and found.equal_time is None
    assert "do not allow" in equal_time_sentence(data)


def test_domain_sentence_counts_losses_too() -> None:
    data = sample.sample_report(moe=1.02)
    found = compare(data)
    assert found is not None
    assert domain_sentence(found).startswith("The MoE is ahead in 1 of 5 domains: ")
    assert "−0.017 (code) to +0.046 (dialogue)" in domain_sentence(found)
    same = compare(
        sample.sample_report(changes={"runs": (dataclasses.replace(found.dense, kind="moe"), found.dense)})
    )
    assert same is not None
    assert "0 of 5 domains: by domain the difference runs from 0.000 (" in domain_sentence(same)


def test_short_numbers() -> None:
    assert [short_number(n) for n in (0, 999, 1_000, 1_234_567, 46.7e9)] == [
        "0",
        "999",
        "1 k",
        "1.23 M",
        "46.7 B",
    ]

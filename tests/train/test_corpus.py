"""Texts with domain tags: right by construction, disjoint, and clear about every bad file."""

from __future__ import annotations

import ast
import json
import operator
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.errors import DataError, DependencyError, MoietyError
from moiety.train.corpus import (
    Corpus,
    Document,
    arithmetic,
    default_corpus,
    dialogues,
    python_library,
    read_sources,
    split_held_out,
)

SMALL_BYTES = 150_000
OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}
COMPARISONS = {"<": operator.lt, ">": operator.gt, "=": operator.eq}


@pytest.fixture(scope="module")
def library() -> Corpus:
    return python_library(SMALL_BYTES)


def _texts(corpus: Corpus, domain: str) -> list[str]:
    return [document.text for document in corpus.documents if document.domain == domain]


def _value(expression: str) -> float:
    """Left to right; no problem mixes operations of different rank."""
    words = expression.split()
    value: float = int(words[0])
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        value = OPERATIONS[sign](value, int(number))
    return value


def test_library_fills_its_share_and_never_more(library: Corpus) -> None:
    for domain in ("code", "reference"):
        size = sum(len(text.encode()) for text in _texts(library, domain))
        assert 0.9 * SMALL_BYTES <= size <= SMALL_BYTES, (domain, size)
    assert not library.notes


def test_library_is_the_same_every_time(library: Corpus) -> None:
    assert python_library(SMALL_BYTES) == library


def test_code_still_parses_and_has_no_docstrings(library: Corpus) -> None:
    for text in _texts(library, "code"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert ast.get_docstring(node) is None, text[:200]


def test_no_prose_is_in_two_domains() -> None:
    corpus = python_library(700_000)  # enough for both the manual and docstrings
    code = "\n".join(_texts(corpus, "code"))
    paragraphs = {
        part for text in _texts(corpus, "reference") for part in text.split("\n\n") if len(part) > 300
    }
    assert len(paragraphs) > 300
    assert not [part for part in paragraphs if part in code]


def test_separated_docstrings_leave_valid_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '"""Über."""; x = 1\nclass A: "one line"\n'
    source += 'def f():\n    """Two\n    lines."""\n\ndef g():\n    "g"; return 1\n'
    (tmp_path / "odd.py").write_text(source, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("skipped = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = python_library(3_000_000)
    (code,) = _texts(corpus, "code")
    names = {
        node.name: ast.unparse(node)
        for node in ast.parse(code).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    assert names == {
        "A": "class A:\n    pass",
        "f": "def f():\n    pass",
        "g": "def g():\n    pass\n    return 1",
    }
    assert _texts(corpus, "reference")[-1] == "odd\n\nÜber.\n\nA\n\none line\n\nf\n\nTwo\nlines.\n\ng\n\ng\n"


def test_missing_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    corpus = python_library(1000)
    assert not corpus.documents
    assert [("'code'" in note, "'reference'" in note) for note in corpus.notes] == [
        (False, True),
        (True, False),
    ]


def test_every_arithmetic_line_is_true() -> None:
    text = "\n".join(document.text for document in arithmetic(SMALL_BYTES, seed=3))
    equations = comparisons = carries = 0
    for line in text.splitlines():
        statement = line.removeprefix("Answer: ").split(", write ")[0]
        statement = re.sub(r"^[a-z ]+: ", "", statement)
        if match := re.fullmatch(r"(\d[\d +x/-]*) = (\d[\d +]*)", statement):
            assert _value(match[1]) == _value(match[2]), line
            equations += 1
        elif match := re.fullmatch(r"(\d+) ([<>=]) (\d+)", statement):
            assert COMPARISONS[match[2]](int(match[1]), int(match[3])), line
            comparisons += 1
        elif match := re.fullmatch(r"(\d+) has (\d) digits, (\d+) has (\d) digits", statement):
            assert (len(match[1]), len(match[3])) == (int(match[2]), int(match[4])), line
        else:
            assert line == "" or line.endswith(("?", ".")) or re.fullmatch(r"Answer: \d+ [a-z]+", line), line
        if match := re.search(r"= (\d+), write (\d), carry (\d)$", line):
            assert int(match[1]) == 10 * int(match[3]) + int(match[2]), line
            carries += 1
    assert min(equations, comparisons, carries) > 100


def test_arithmetic_answers_its_own_questions() -> None:
    text = "\n".join(document.text for document in arithmetic(SMALL_BYTES, seed=4))
    checked = 0
    for problem in text.split("\n\n"):
        lines = problem.strip().split("\n")
        if match := re.fullmatch(r"Add (\d+) and (\d+)\.", lines[0]):
            assert lines[-1] == f"Answer: {match[1]} + {match[2]} = {int(match[1]) + int(match[2])}"
            written = [re.search(r"write (\d)", line) for line in lines[1:-1]]
            digits = "".join(found[1] for found in reversed(written) if found)
            assert int(digits) == int(match[1]) + int(match[2]), problem
            checked += 1
        elif match := re.fullmatch(r"Multiply (\d+) by (\d+)\.", lines[0]):
            assert lines[-1] == f"Answer: {match[1]} x {match[2]} = {int(match[1]) * int(match[2])}"
            checked += 1
        elif match := re.fullmatch(r"How far is it from (\d+) to (\d+)\?", lines[0]):
            steps = [int(line.split()[2]) for line in lines[1:-1]]
            assert sum(steps) == int(match[2]) - int(match[1]), problem
            checked += 1
        elif problem.strip() and lines[-1][-1].isalpha():
            assert lines[-2].split(" = ")[1] == lines[-1].split()[1], problem
            checked += 1
    assert checked > 300


def test_arithmetic_depends_on_its_seed_alone() -> None:
    assert list(arithmetic(20_000, seed=1)) == list(arithmetic(20_000, seed=1))
    assert list(arithmetic(20_000, seed=1)) != list(arithmetic(20_000, seed=2))
    assert sum(document.size_bytes for document in arithmetic(20_000)) <= 20_000


def test_default_corpus_names_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moiety.train.corpus.find_dialogues", lambda: None)
    corpus = default_corpus(bytes_per_domain=30_000)
    assert {document.domain for document in corpus.documents} == {"code", "reference", "arithmetic"}
    (note,) = corpus.notes
    assert "chatterbot-corpus" in note and "pip install" in note


def _language(folder: Path, name: str, conversations: object) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / name / "talk.yml"
    path.write_text(json.dumps({"categories": ["talk"], "conversations": conversations}, ensure_ascii=False))
    return path


def test_dialogues_become_domains_and_keep_a_question_together(tmp_path: Path) -> None:
    talk = [
        [f"Wie geht es {i % 100}?", f"Antwort {i}: ja, gut, danke sehr, und so geht es weiter bis ans Ende."]
        for i in range(1200)
    ]
    _language(tmp_path, "german", [*talk, "eine Zeile"])
    _language(tmp_path, "tiny", [["a", "b"]])
    corpus = dialogues(tmp_path, SMALL_BYTES)
    assert {document.domain for document in corpus.documents} == {"german"}
    assert len(corpus.documents) > 10
    homes: dict[str, set[int]] = {}
    for number, document in enumerate(corpus.documents):
        for question in re.findall(r"Wie geht es \d+\?", document.text):
            homes.setdefault(question, set()).add(number)
    assert len(homes) == 100 and all(len(home) == 1 for home in homes.values())
    assert corpus.notes == ("languages left out, fewer than 100,000 bytes each: tiny",)
    joined = "\n".join(document.text for document in corpus.documents)
    assert all(f"Antwort {i}:" in joined for i in range(1200)) and "eine Zeile" in joined


@pytest.mark.parametrize("content", ["conversations: [1, 2]", "conversations: {", "- a"])
def test_bad_dialogue_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = _language(tmp_path, "german", [])
    path.write_text(content + "\n#" + "x" * 120_000)
    with pytest.raises(DataError, match=re.escape(str(path))):
        dialogues(tmp_path, SMALL_BYTES)


def test_sources_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes("\ufeffEin Buch.\r\n".encode())
    lines = [{"text": "a\u2028b"}, {"text": "c", "domain": "law"}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    (tmp_path / "ignored.csv").write_text("x")
    book, rows = Document("book", "Ein Buch.\r\n"), (Document("rows", "a\u2028b"), Document("law", "c"))
    assert read_sources([str(tmp_path / "book.txt")]).documents == (book,)
    assert read_sources([str(tmp_path / "rows.jsonl")]).documents == rows
    assert read_sources([str(tmp_path)]).documents == (book, *rows)
    renamed = read_sources([f"{tmp_path / 'rows.jsonl'}:domain=mine"]).documents
    assert renamed == (Document("mine", "a\u2028b"), Document("mine", "c"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t\n", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("zero.txt", b"abc\0def", "NUL byte at offset 3"),
        ("latin.txt", b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        ("cut.txt", "né".encode()[:-1], "byte 0xc3 at offset 1"),
        ("table.csv", b"a,b", "ends in '.csv'"),
        ("noname", b"text", "ends in ''"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "bad.jsonl:2 is not JSON"),
        ("list.jsonl", b"[1]", "list.jsonl:1 is list"),
        ("key.jsonl", b'{"content": "a"}', "key.jsonl:1: 'text' is None"),
        ("none.jsonl", b'{"text": ""}', "none.jsonl:1: 'text' is ''"),
        ("number.jsonl", b'{"text": "a", "domain": 3}', "number.jsonl:1: 'domain' is 3"),
        ("half.jsonl", b'{"text": "\\ud800"}', "half.jsonl:1 has half a surrogate"),
        ("deep.jsonl", b"[" * 200_000, "deep.jsonl:1 is not JSON"),
    ],
)
def test_bad_file_says_what_and_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_sources([str(tmp_path / name)])
    assert caught.value.hint


def test_bad_sources(tmp_path: Path) -> None:
    for sources, message in (
        ([str(tmp_path / "gone.txt")], "does not exist"),
        ([str(tmp_path)], "has no .txt or .jsonl"),
        ([], "no documents"),
        ([f"{tmp_path}:domain="], "empty domain"),
    ):
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            read_sources(sources)
        assert caught.value.hint


def test_hub_needs_its_package_and_finds_the_text_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="datasets") as caught:
        read_sources(["hf:someone/tales"])
    assert caught.value.hint == "pip install 'moiety[data]'"

    class Table(dict[str, list[str]]):
        @property
        def features(self) -> dict[str, SimpleNamespace]:
            return {name: SimpleNamespace(dtype="string") for name in self}

    tables = {"a/one": Table(story=["x", ""]), "a/named": Table(text=["y"], title=["t"])}
    tables["a/two"] = Table(left=["x"], right=["y"])
    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = lambda name, split: tables[name]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_sources(["hf:a/one"]).documents == (Document("one", "x"),)
    assert read_sources(["hf:a/named:domain=z"]).documents == (Document("z", "y"),)
    with pytest.raises(DataError, match="left"):
        read_sources(["hf:a/two"])


def test_split_is_disjoint_complete_and_about_a_twentieth(library: Corpus) -> None:
    documents = (*library.documents, *arithmetic(SMALL_BYTES), library.documents[0])
    split = split_held_out(documents)
    train, held_out = {one.text for one in split.train}, {one.text for one in split.held_out}
    assert not train & held_out
    assert train | held_out == {one.text for one in documents}
    assert split.duplicates == len(documents) - len(split.train) - len(split.held_out) >= 1
    assert any("identical" in note for note in split.notes)
    for domain in ("code", "reference", "arithmetic"):
        held = sum(one.size_bytes for one in split.held_out if one.domain == domain)
        whole = held + sum(one.size_bytes for one in split.train if one.domain == domain)
        assert 0.02 <= held / whole <= 0.1, (domain, held / whole)


def test_split_does_not_depend_on_order(library: Corpus) -> None:
    forward, backward = split_held_out(library.documents), split_held_out(library.documents[::-1])
    assert set(forward.held_out) == set(backward.held_out)
    assert set(forward.train) == set(backward.train)


def test_identical_text_in_two_domains_is_kept_once() -> None:
    split = split_held_out([Document("a", "same"), Document("b", "same"), Document("b", "other")], 0)
    assert (split.train, split.duplicates) == ((Document("a", "same"), Document("b", "other")), 1)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=400), st.floats(0.01, 0.5))
def test_one_document_gives_its_end(text: str, fraction: float) -> None:
    split = split_held_out([Document("book", text)], fraction)
    assert "".join(one.text for one in (*split.train, *split.held_out)) == text
    assert len(split.train) == 1 and len(split.held_out) <= 1
    assert len(split.notes) == 1 and "'book'" in split.notes[0]


def test_one_document_is_cut_at_a_line() -> None:
    split = split_held_out([Document("book", "a line of text\n" * 100)])
    assert (
        split.held_out[0].text == "a line of text\n" * 5 or split.held_out[0].text == "a line of text\n" * 6
    )


def test_bad_splits() -> None:
    for documents, fraction in (
        ([], 0.05),
        ([Document("a", "b")], 0.9),
        ([Document("a", "b")], float("nan")),
    ):
        with pytest.raises(MoietyError) as caught:
            split_held_out(documents, fraction)
        assert caught.value.hint

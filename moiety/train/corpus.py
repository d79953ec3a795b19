"""Texts with domain tags, from every machine's own Python or from the user's files.

The default corpus ships with nothing: `code` is the standard library without its docstrings,
`reference` is the language manual and those docstrings, `arithmetic` is generated and right by
construction, and each further domain is a language of the package `chatterbot-corpus`. Whatever is
left out is said in `Corpus.notes`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiety.errors import DataError, StorageError
from moiety.packages import need

__all__ = [
    "Corpus",
    "Document",
    "Split",
    "arithmetic",
    "default_corpus",
    "dialogues",
    "find_dialogues",
    "python_library",
    "read_sources",
    "split_held_out",
]

SUFFIXES = (".jsonl", ".txt")
LIBRARY_SKIPPED = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
LANGUAGE_MINIMUM_BYTES = 100_000  # the twentieth that is held out must be enough to measure on
DIALOGUE_DOCUMENT_BYTES = 1_500
PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands")
NAMES = ("Amina", "Bruno", "Chen", "Dora", "Emeka", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kavi", "Lena")
THINGS = ("apples", "books", "buttons", "coins", "eggs", "letters", "marbles", "pears", "stamps", "tickets")


def default_corpus(*, bytes_per_domain: int = 1_500_000, seed: int = 0) -> Corpus:
    """The corpus that needs no download: the same texts for the same interpreter and packages.

    Args:
        bytes_per_domain: Most UTF-8 bytes of one domain; a smaller domain is taken whole.
        seed: Of the generated arithmetic.
    """
    library = python_library(bytes_per_domain)
    sheets = Corpus(tuple(arithmetic(bytes_per_domain, seed=seed)), ())
    parts = (library, sheets, dialogues(find_dialogues(), bytes_per_domain))
    return Corpus(
        tuple(document for part in parts for document in part.documents),
        tuple(note for part in parts for note in part.notes),
    )


def read_sources(sources: Sequence[str]) -> Corpus:
    """The documents of the user's files.

    Args:
        sources: Each a `*.txt` (one document), a `*.jsonl` (one object a line with `text` and,
            if wanted, `domain`), a folder of those, or `hf:ID` (needs the extra `data`). The domain
            is the file's stem, unless the line says it or `:domain=NAME` follows the source.

    Raises:
        DataError: missing, empty, binary or unknown file, bad line, or no documents at all.
        DependencyError: `hf:ID` without the package `datasets`.
        StorageError: the system refused to read.
    """
    documents: list[Document] = []
    for source in sources:
        place, marker, domain = source.rpartition(":domain=")
        place, domain = (place, domain) if marker else (source, "")
        if marker and not domain.strip():
            raise DataError(f"{source!r} names an empty domain", hint="write FILE:domain=NAME")
        found = _hub_documents(place[3:]) if place.startswith("hf:") else _path_documents(Path(place))
        documents += (Document(domain, found_one.text) for found_one in found) if marker else found
    if not documents:
        raise DataError(f"no documents in {list(sources)}", hint="name a .txt, a .jsonl, a folder or hf:ID")
    return Corpus(tuple(documents), ())


def split_held_out(documents: Iterable[Document], fraction: float = 0.05) -> Split:
    """Drop identical texts, then hold out whole documents of each domain, chosen by their hash.

    The choice depends on the texts alone, not on their order. A domain of a single document gives
    its last lines instead, which is said in the notes.

    Args:
        documents: All texts.
        fraction: Share of each domain's bytes to hold out, 0 to 0.5; at least one document is.

    Raises:
        DataError: no documents, or a fraction outside 0 to 0.5.
    """
    if not 0 <= fraction <= 0.5:
        raise DataError(f"held-out fraction is {fraction}; allowed is 0 to 0.5", hint="0.05 is usual")
    unique: dict[str, Document] = {}
    given = 0
    for document in documents:
        given += 1
        unique.setdefault(_digest(document.text), document)
    if not unique:
        raise DataError("there are no documents to split", hint="give at least one text")
    domains: dict[str, list[tuple[str, Document]]] = {}
    for digest, document in unique.items():
        domains.setdefault(document.domain, []).append((digest, document))
    train: list[Document] = []
    held_out: list[Document] = []
    notes: list[str] = []
    if given > len(unique):
        notes.append(f"{given - len(unique)} documents were identical to an earlier one and were left out")
    for domain in sorted(domains):
        members = domains[domain]
        if len(members) == 1 and fraction > 0:
            kept, taken, note = _split_text(members[0][1], fraction)
            notes.append(note)
        else:
            chosen = _choose_held_out(members, fraction)
            kept = [document for digest, document in members if digest not in chosen]
            taken = [document for digest, document in members if digest in chosen]
        train += kept
        held_out += taken
    return Split(tuple(train), tuple(held_out), given - len(unique), tuple(notes))


def arithmetic(size_bytes: int, *, seed: int = 0) -> Iterator[Document]:
    """Sheets of eight worked problems, every result computed: the domain `arithmetic`.

    Args:
        size_bytes: Most UTF-8 bytes of all sheets together.
        seed: Same seed, same sheets.
    """
    kinds = (_addition, _subtraction, _multiplication, _comparison, _word_problem)
    generator = random.Random(seed)
    left_bytes = size_bytes
    while True:
        text = "\n".join(generator.choice(kinds)(generator) for _ in range(8))
        left_bytes -= len(text)
        if left_bytes < 0:
            return
        yield Document("arithmetic", text)


def python_library(bytes_per_domain: int) -> Corpus:
    """Domains `code` and `reference` from the running interpreter; no text is in both.

    Modules are taken in the order of a hash of their path, so that a small sample spans the library.

    Args:
        bytes_per_domain: Most UTF-8 bytes of each of the two domains.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        (path.relative_to(folder).as_posix() for path in folder.rglob("*.py")),
        key=lambda name: (_digest(name), name),
    )
    code, reference = _Share(bytes_per_domain), _Share(bytes_per_domain)
    notes = _add_manual(reference)
    for name in names:
        if code.full and reference.full:
            break
        if LIBRARY_SKIPPED.intersection(name.split("/")):
            continue
        separated = _separate_docstrings(name, folder / name)
        if separated is not None:
            code.add("code", separated[0])
            reference.add("reference", separated[1])
    if not code.documents:
        notes.append(f"domain 'code' is left out: no readable Python files under {folder}")
    return Corpus((*code.documents, *reference.documents), tuple(notes))


def find_dialogues() -> Path | None:
    """The data folder of the package `chatterbot-corpus`, or None when it is not installed."""
    found = importlib.util.find_spec("chatterbot_corpus")
    places = found.submodule_search_locations if found else None
    folders = [Path(place) / "data" for place in places or ()]
    return next((folder for folder in folders if folder.is_dir()), None)


def dialogues(folder: Path | None, bytes_per_domain: int) -> Corpus:
    """One domain for each language of `chatterbot-corpus` that has enough text.

    A document is a run of neighbouring conversations of one file; answers to the same question
    stay together, so that a held-out document does not ask what a training document answered.
    The files of jokes are left out.

    Args:
        folder: The package's data folder, `find_dialogues()`; None leaves these domains out and says so.
        bytes_per_domain: Most UTF-8 bytes of one language.

    Raises:
        DataError: a file that is not conversations in YAML.
    """
    if folder is None:
        missing = "natural-language domains are left out: the package chatterbot-corpus is not installed"
        return Corpus((), (f"{missing} (pip install 'moiety[demo]')",))
    yaml = need("yaml", "the demo's corpus", "moiety[demo]")
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    documents: list[Document] = []
    small: list[str] = []
    for language in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [path for path in sorted(language.glob("*.yml")) if path.stem != "humor"]
        if sum(path.stat().st_size for path in files) < LANGUAGE_MINIMUM_BYTES:
            small.append(language.name)
            continue
        share = _Share(bytes_per_domain)
        for path in files:
            for text in _conversations(path, lambda text: yaml.load(text, Loader=loader), yaml.YAMLError):
                share.add(language.name, text)
        documents += share.documents
    limit = f"fewer than {LANGUAGE_MINIMUM_BYTES:,} bytes"
    notes = (f"languages left out, {limit} each: {', '.join(small)}",) if small else ()
    return Corpus(tuple(documents), notes)


def _conversations(path: Path, load: Callable[[str], Any], bad_yaml: type[Exception]) -> Iterator[str]:
    """Texts of about DIALOGUE_DOCUMENT_BYTES from one file, a line for each thing said."""
    try:
        loaded = load(_read_text(path))
    except bad_yaml as error:
        raise DataError(f"{path} is not YAML: {error}", hint="reinstall chatterbot-corpus") from error
    conversations = loaded.get("conversations") if isinstance(loaded, dict) else None
    if not isinstance(conversations, list) or not all(isinstance(one, list | str) for one in conversations):
        raise DataError(f"{path} has no list of conversations", hint="reinstall chatterbot-corpus")
    answers: dict[str, list[str]] = {}
    for conversation in conversations:
        said = [conversation] if isinstance(conversation, str) else conversation
        lines = [str(line).strip() for line in said if line is not None]
        if lines:
            answers.setdefault(lines[0], []).append("\n".join(lines))
    pending: list[str] = []
    for group in answers.values():
        pending += group
        if sum(len(text.encode()) for text in pending) >= DIALOGUE_DOCUMENT_BYTES:
            yield "\n\n".join(pending) + "\n"
            pending = []
    if pending:
        yield "\n\n".join(pending) + "\n"


def _add_manual(reference: _Share) -> list[str]:
    """Put the topics of the language reference into `reference`; the note when they are not there."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        return ["domain 'reference' has no language manual: this Python has no pydoc_data.topics"]
    for name in sorted(topics, key=lambda name: (_digest(name), name)):
        reference.add("reference", topics[name])
    return []


def _separate_docstrings(name: str, path: Path) -> tuple[str, str] | None:
    """A module's source without docstrings, and its docstrings as prose; None if it cannot be parsed."""
    try:
        source = path.read_bytes().decode("utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return None
    lines = source.encode().splitlines(keepends=True)
    prose: list[tuple[int, str]] = []
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        title = module if isinstance(node, ast.Module) else node.name
        prose.append((node.body[0].lineno, f"{title}\n\n{text}\n"))
        _erase(lines, node.body[0], alone=len(node.body) == 1 and not isinstance(node, ast.Module))
    return b"".join(lines).decode(), "\n".join(text for _, text in sorted(prose))


def _erase(lines: list[bytes], docstring: ast.stmt, *, alone: bool) -> None:
    """Blank a docstring out of `lines`; `pass` takes its place where the block would be empty."""
    assert docstring.end_lineno is not None and docstring.end_col_offset is not None, ast.dump(docstring)
    first, last = docstring.lineno - 1, docstring.end_lineno - 1
    before, after = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
    lines[first : last + 1] = [b""] * (last + 1 - first)
    if alone or before.strip() or after.strip():
        lines[first] = before + b"pass" + after


def _path_documents(path: Path) -> list[Document]:
    if path.is_dir():
        files = sorted(found for found in path.rglob("*") if found.suffix in SUFFIXES and found.is_file())
        if not files:
            raise DataError(f"folder {path} has no .txt or .jsonl file", hint="name a folder that has some")
        return [document for file in files for document in _path_documents(file)]
    if not path.exists():
        raise DataError(f"{path} does not exist", hint="check the path; hf:ID reads from the hub")
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path} ends in {path.suffix!r}; allowed are {', '.join(SUFFIXES)} and folders of those",
            hint="rename it to .txt if it is plain text",
        )
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty", hint="remove it from the list or fill it")
    return [Document(path.stem, text)] if path.suffix == ".txt" else list(_json_lines(path, text))


def _json_lines(path: Path, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_document(line, f"{path}:{number}", path.stem)


def _json_document(line: str, place: str, default_domain: str) -> Document:
    hint = 'each line is an object such as {"text": "...", "domain": "..."}'
    try:
        loaded = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}", hint=hint) from error
    if not isinstance(loaded, dict):
        raise DataError(f"{place} is {type(loaded).__name__}, not an object", hint=hint)
    text, domain = loaded.get("text"), loaded.get("domain", default_domain)
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: 'text' is {text!r}; it must be a string that is not empty", hint=hint)
    if not isinstance(domain, str) or not domain.strip():
        raise DataError(f"{place}: 'domain' is {domain!r}; it must be a string that is not empty", hint=hint)
    try:
        (text + domain).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} has half a surrogate pair, which is not text", hint=hint) from error
    return Document(domain, text)


def _hub_documents(identifier: str) -> list[Document]:
    """Every row of the text column of a hub data set's `train` split."""
    datasets = need("datasets", "a data set of the hub", "moiety[data]")
    table = datasets.load_dataset(identifier, split="train")
    columns = [
        name
        for name, feature in table.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        raise DataError(
            f"hf:{identifier} has the string columns {columns}; one named 'text' is needed",
            hint="export the column to a .jsonl file with the key 'text'",
        )
    return [Document(identifier.rpartition("/")[2], text) for text in table[column] if text]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(f"{path} is binary: a NUL byte at offset {zero}", hint="give text in UTF-8")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}",
            hint="convert it, for example with iconv -f LATIN1 -t UTF-8",
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _choose_held_out(members: list[tuple[str, Document]], fraction: float) -> set[str]:
    """Digests in rising order until the fraction is reached; what would pass twice of it is jumped over."""
    if fraction == 0:
        return set()
    target_bytes = fraction * sum(document.size_bytes for _, document in members)
    chosen: set[str] = set()
    taken_bytes = 0
    for digest, document in sorted(members, key=lambda member: member[0]):
        if taken_bytes >= target_bytes:
            break
        if taken_bytes + document.size_bytes <= 2 * target_bytes:
            chosen.add(digest)
            taken_bytes += document.size_bytes
    return chosen or {min(members, key=lambda member: (member[1].size_bytes, member[0]))[0]}


def _split_text(document: Document, fraction: float) -> tuple[list[Document], list[Document], str]:
    """Cut one document near its end, at a line or a space where there is one in reach."""
    text, domain = document.text, document.domain
    cut = len(text) - round(len(text) * fraction)
    for mark in ("\n", " "):
        found = text.rfind(mark, len(text) - 2 * (len(text) - cut), cut)
        if found >= 0:
            cut = found + 1
            break
    if not 0 < cut < len(text):
        return [document], [], f"domain {domain!r} is too short to hold anything out for evaluation"
    note = f"domain {domain!r} is one document: its last {len(text) - cut:,} characters are held out"
    return [Document(domain, text[:cut])], [Document(domain, text[cut:])], note


def _number_pair(generator: random.Random) -> tuple[int, int]:
    return generator.randrange(10, 10 ** generator.randint(2, 5)), generator.randrange(
        10, 10 ** generator.randint(2, 5)
    )


def _addition(generator: random.Random) -> str:
    first, second = _number_pair(generator)
    lines = [f"Add {first} and {second}."]
    carry, left, right = 0, first, second
    for place in PLACES:
        total = left % 10 + right % 10 + carry
        if not left and not right and not carry:
            break
        carried = f" + {carry}" if carry else ""
        lines.append(
            f"{place}: {left % 10} + {right % 10}{carried} = {total}, write {total % 10}, carry {total // 10}"
        )
        left, right, carry = left // 10, right // 10, total // 10
    return "\n".join([*lines, f"Answer: {first} + {second} = {first + second}\n"])


def _subtraction(generator: random.Random) -> str:
    second, first = sorted(_number_pair(generator))
    lines = [f"How far is it from {second} to {first}?"]
    at = second
    for step in (10, 100, 1000, 10_000):
        target = -(-at // step) * step
        if at < target <= first:
            lines.append(f"{at} + {target - at} = {target}")
            at = target
    if at < first:
        lines.append(f"{at} + {first - at} = {first}")
    return "\n".join([*lines, f"Answer: {first} - {second} = {first - second}\n"])


def _multiplication(generator: random.Random) -> str:
    first, second = generator.randrange(12, 1000), generator.randrange(12, 1000)
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(second))) if digit != "0"]
    lines = [f"Multiply {first} by {second}.", f"{second} = {' + '.join(map(str, reversed(parts)))}"]
    total = 0
    for index, part in enumerate(reversed(parts)):
        lines.append(f"{first} x {part} = {first * part}")
        if index:
            lines.append(f"{total} + {first * part} = {total + first * part}")
        total += first * part
    return "\n".join([*lines, f"Answer: {first} x {second} = {total}\n"])


def _comparison(generator: random.Random) -> str:
    first, second = _number_pair(generator)
    if generator.random() < 0.5:
        second = max(10, first + generator.randint(-99, 99))
    lines = [f"Which is larger, {first} or {second}?"]
    if len(str(first)) != len(str(second)):
        lines.append(f"{first} has {len(str(first))} digits, {second} has {len(str(second))} digits")
    else:
        pairs = list(zip(str(first), str(second), strict=True))
        for place, (left, right) in zip(reversed(PLACES[: len(pairs)]), pairs, strict=True):
            lines.append(f"{place}: {left} {_sign(int(left), int(right))} {right}")
            if left != right:
                break
    return "\n".join([*lines, f"Answer: {first} {_sign(first, second)} {second}\n"])


def _sign(first: int, second: int) -> str:
    return "=" if first == second else "<" if first < second else ">"


def _word_problem(generator: random.Random) -> str:
    giver, taker = generator.sample(NAMES, 2)
    thing, more, fewer = generator.choice(THINGS), generator.randrange(20, 99), generator.randrange(2, 20)
    stories = (
        (f"{giver} has {more} {thing}. {taker} brings {fewer} more.", "+", more + fewer, "are there now"),
        (f"{giver} has {more} {thing} and gives {taker} {fewer}.", "-", more - fewer, f"does {giver} keep"),
        (f"{giver} fills {fewer} boxes with {more} {thing} each.", "x", more * fewer, "are in the boxes"),
        (
            f"{giver} and {taker} pack {more * fewer} {thing} into {fewer} equal bags.",
            "/",
            more,
            "are in each bag",
        ),
    )
    story, operation, result, question = generator.choice(stories)
    if operation == "/":
        more *= fewer
    left, right = (fewer, more) if operation == "x" else (more, fewer)
    return (
        f"{story} How many {thing} {question}?\n"
        f"{left} {operation} {right} = {result}\nAnswer: {result} {thing}\n"
    )


@dataclass(frozen=True)
class Document:
    """One text and the domain it belongs to. Domains are evaluated and inspected apart."""

    domain: str
    text: str

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Documents, and in plain words what was left out of them."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents held out; no text is in both."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    duplicates: int
    notes: tuple[str, ...]


class _Share:
    """Documents up to a number of bytes; one that would pass it is left out, and smaller ones go on."""

    def __init__(self, limit_bytes: int) -> None:
        self.documents: list[Document] = []
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0

    @property
    def full(self) -> bool:
        return self._taken_bytes >= 0.97 * self._limit_bytes

    def add(self, domain: str, text: str) -> None:
        document = Document(domain, text)
        if text.strip() and self._taken_bytes + document.size_bytes <= self._limit_bytes:
            self.documents.append(document)
            self._taken_bytes += document.size_bytes

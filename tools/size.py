#!/usr/bin/env python3
"""How long everything in moiety/ is, and whether that is within the caps.

    python tools/size.py            a table: folders, longest files, function lengths
    python tools/size.py --check    exit code 1 and a list when a cap is passed
    python tools/size.py --json     the same numbers for scripts

Functions and files are capped in lines of any kind. The package is capped in lines of code: a docstring that says
shapes, units, errors and source must not be what there is no room for. Of C, CSS, HTML and JavaScript every line
counts. Density (tokens per line of code) is shown so that a cap is never met by writing denser lines.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["FileSize", "FunctionSize", "load", "main", "over_caps"]

FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 600
PACKAGE_CODE_LINES_MAX = 43_915
SUFFIXES = (".c", ".css", ".h", ".html", ".js", ".py")
LAYOUT_TOKENS = frozenset(
    {tokenize.COMMENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.INDENT, tokenize.NEWLINE, tokenize.NL}
)


@dataclass(frozen=True, kw_only=True)
class FunctionSize:
    """One function or method: `name` is qualified, `line` is where its `def` stands."""

    name: str
    line: int
    lines: int


@dataclass(frozen=True, kw_only=True)
class FileSize:
    """One file: all its lines, its lines of code, and for Python the tokens on them and its functions."""

    path: str
    lines: int
    code_lines: int
    tokens: int
    functions: tuple[FunctionSize, ...]


def load(root: Path) -> list[FileSize]:
    """Measure every source file of `root`/moiety, sorted by path."""
    paths = sorted(path for path in (root / "moiety").rglob("*") if path.suffix in SUFFIXES)
    return [_measure(path, path.relative_to(root).as_posix()) for path in paths]


def over_caps(files: Iterable[FileSize]) -> list[str]:
    """One sentence for each cap that is passed; empty when all is well."""
    files = list(files)
    complaints = []
    for file in files:
        if file.lines > FILE_LINES_MAX:
            complaints.append(f"{file.path}: {file.lines} lines, the cap is {FILE_LINES_MAX}")
        for function in file.functions:
            if function.lines > FUNCTION_LINES_MAX:
                complaints.append(
                    f"{file.path}:{function.line}: {function.name} has {function.lines} lines, "
                    f"the cap is {FUNCTION_LINES_MAX}"
                )
    total = sum(file.code_lines for file in files)
    if total > PACKAGE_CODE_LINES_MAX:
        complaints.append(f"moiety/: {total} lines of code, the cap is {PACKAGE_CODE_LINES_MAX}")
    return complaints


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Line counts of moiety/ and their caps.")
    parser.add_argument("--check", action="store_true", help="exit 1 and list what is over a cap")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository"
    )
    options = parser.parse_args(arguments)
    files = load(options.root)
    complaints = over_caps(files)
    if options.json:
        print(json.dumps({"files": [asdict(file) for file in files], "over_caps": complaints}, indent=1))
    elif options.check:
        total, code = sum(file.lines for file in files), sum(file.code_lines for file in files)
        within = f"size: {total} lines, {code} of them code, in {len(files)} files, all within the caps"
        print("\n".join(complaints) or within)
    else:
        print(_table(files))
    return 1 if options.check and complaints else 0


def _measure(path: Path, name: str) -> FileSize:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if path.suffix != ".py":
        return FileSize(path=name, lines=lines, code_lines=lines, tokens=0, functions=())
    tree = ast.parse(text, filename=name)
    code_lines, tokens = _density(text, _docstring_lines(tree))
    functions = tuple(_functions(tree, ""))
    return FileSize(path=name, lines=lines, code_lines=code_lines, tokens=tokens, functions=functions)


def _functions(node: ast.AST, prefix: str) -> Iterable[FunctionSize]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert child.end_lineno is not None
            name = prefix + child.name
            yield FunctionSize(name=name, line=child.lineno, lines=child.end_lineno - child.lineno + 1)
            yield from _functions(child, f"{name}.")
        else:
            inner = f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix
            yield from _functions(child, inner)


def _docstring_lines(tree: ast.Module) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.end_lineno:
            found.update(range(node.lineno, node.end_lineno + 1))
    return found


def _density(text: str, docstring_lines: set[int]) -> tuple[int, int]:
    """Lines that hold code, and the tokens on them."""
    code_lines: set[int] = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT_TOKENS and token.start[0] not in docstring_lines:
            code_lines.update(range(token.start[0], token.end[0] + 1))
            tokens += 1
    return len(code_lines), tokens


def _table(files: Sequence[FileSize]) -> str:
    folders: dict[str, list[FileSize]] = {}
    for file in files:
        parts = file.path.split("/")
        folders.setdefault("/".join(parts[:2]) + "/" if len(parts) > 2 else "moiety/*", []).append(file)
    rows = [f"{'folder':<24}{'files':>7}{'lines':>8}{'code':>8}{'tokens per line of code':>26}"]
    for folder, inside in [*sorted(folders.items()), ("all", list(files))]:
        rows.append(
            f"{folder:<24}{len(inside):>7}{sum(f.lines for f in inside):>8}"
            f"{sum(f.code_lines for f in inside):>8}{_tokens_per_line(inside):>26}"
        )
    rows += ["", f"{'longest files':<60}{'lines':>8}"]
    for file in sorted(files, key=lambda file: -file.lines)[:8]:
        rows.append(f"{file.path:<60}{file.lines:>8}")
    functions = sorted(
        ((function, file.path) for file in files for function in file.functions),
        key=lambda pair: -pair[0].lines,
    )
    rows += ["", f"{'longest functions':<60}{'lines':>8}"]
    for function, path in functions[:8]:
        rows.append(f"{f'{path}:{function.line} {function.name}':<60}{function.lines:>8}")
    if functions:
        count = len(functions)
        median, ninth = functions[count // 2][0].lines, functions[count // 10][0].lines
        rows += ["", f"{count} functions: median {median}, p90 {ninth}, max {functions[0][0].lines} lines"]
    return "\n".join(rows)


def _tokens_per_line(files: Iterable[FileSize]) -> str:
    files = [file for file in files if file.tokens]
    code_lines = sum(file.code_lines for file in files)
    return f"{sum(file.tokens for file in files) / code_lines:.1f}" if code_lines else "-"


if __name__ == "__main__":
    sys.exit(main())

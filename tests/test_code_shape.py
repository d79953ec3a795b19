"""The rules that can be read off the source: levels, sizes, names, forbidden calls, documents that tell the truth.

Each test is one rule; a failure names every file and line that breaks it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import size

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moiety"

# Level of each module or package; the longest matching name counts. Imports point down.
LEVELS = {
    "moiety.errors": 0,
    "moiety.packages": 0,
    "moiety.fields": 0,
    "moiety.config": 0,
    "moiety.cost": 0,
    "moiety.registry": 0,
    "moiety.residency": 0,
    "moiety.schedule": 0,
    "moiety.storage": 0,
    "moiety.tracefile": 0,
    "moiety.traceimport": 0,
    "moiety.routing": 1,
    "moiety.formats": 1,
    "moiety.backends": 2,
    "moiety.plan": 2,
    "moiety.observe.stats": 2,
    "moiety.observe.alarm": 2,
    "moiety.observe.record": 2,
    "moiety.observe.page": 2,
    "moiety.observe.inspect_page": 2,
    "moiety.moe": 3,
    "moiety.model": 4,
    "moiety.quant": 5,
    "moiety.parallel": 4,
    "moiety.train": 5,
    "moiety.infer": 5,
    "moiety.serve": 6,
    "moiety.observe": 6,
    "moiety.cli": 7,
    "moiety.__main__": 8,
}
# Modules that must work where torch does not exist.
GROUND_FLOOR = (
    "moiety.errors",
    "moiety.packages",
    "moiety.fields",
    "moiety.config",
    "moiety.cost",
    "moiety.registry",
    "moiety.residency",
    "moiety.schedule",
    "moiety.storage",
    "moiety.plan",
    "moiety.infer.pages",
    "moiety.infer.scheduler",
)
HEAVY = ("torch", "numpy", "tokenizers", "safetensors", "transformers")
TEST_ORACLES = ("transformers", "peft")

FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "runs text as code",
    "hasattr": "ask for the type, or give the class the attribute",
    "os.system": "use subprocess.run with a list",
    "torch.load": "unpickles; weights are safetensors",
    "torch.save": "pickles; weights are safetensors",
    "jinja2.Environment": "use jinja2.sandbox.ImmutableSandboxedEnvironment",
    "jinja2.Template": "use jinja2.sandbox.ImmutableSandboxedEnvironment",
}
UNSAFE_LOADERS = ("yaml.Loader", "yaml.CLoader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.unsafe_load")
FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")
# Where a library raises bare `Exception`, and nothing narrower can be caught: only to raise our own from it.
CATCHES_ALL_TO_RAISE = {"moiety.model.tokenizer": "tokenizers (Rust) raises Exception for any bad file"}
FORBIDDEN_NAMES = {  # the same calls under their bare names, when imported from the module
    ("torch", "load"),
    ("torch", "save"),
    ("os", "system"),
    ("jinja2", "Environment"),
    ("jinja2", "Template"),
}


# Reading the source


def module_name(path: Path) -> str:
    """`moiety/train/loop.py` -> `moiety.train.loop`; a package is named by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


MODULES = sources()


@functools.cache
def parsed(name: str) -> ast.Module:
    path = MODULES[name]
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(name: str, node: ast.AST) -> str:
    return f"{MODULES[name].relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def in_package(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported name, wherever the import stands: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from ((f"{dots}{node.module or ''}.{alias.name}", node) for alias in node.names)


def runs_on_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements executed when the module is imported, those under `if TYPE_CHECKING:` left out."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, or an empty text for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        start = dotted(node.value)
        return f"{start}.{node.attr}" if start else ""
    return ""


# Levels


def level_key(name: str) -> str:
    """The entry of LEVELS that a module belongs to."""
    found = [key for key in LEVELS if in_package(name, key)]
    assert found, f"{name} has no level; add it to LEVELS in {Path(__file__).name} and to docs/structure.md"
    return max(found, key=len)


def level(name: str) -> int:
    """A package's `__init__` runs before any of its modules, so it has the lowest level among them."""
    below = [value for key, value in LEVELS.items() if in_package(key, name)]
    return min([LEVELS[level_key(name)], *below])


def target(imported: str) -> str:
    """The module an imported name comes from: `moiety.config.option` -> `moiety.config`."""
    while imported not in MODULES and "." in imported:
        imported = imported.rpartition(".")[0]
    return imported


def may_import(importer: str, imported: str) -> bool:
    """Down is allowed; sideways only in the same package, or between the single files of level 0."""
    if level(imported) != level(importer):
        return level(imported) < level(importer)
    same_package = importer.split(".")[1] == imported.split(".")[1]
    return same_package or level(importer) == 0


def upward(importer: str, tree: ast.AST) -> list[str]:
    complaints = []
    for imported, node in imports(tree):
        if imported.startswith("."):
            complaints.append(f"{where(importer, node)}: relative import; write it from `moiety.`")
        elif imported.split(".")[0] == "moiety":
            found = target(imported)
            if found == "moiety":
                if imported != "moiety.__version__":
                    complaints.append(f"{where(importer, node)}: import `{imported}` from its own module")
            elif not may_import(importer, found):
                complaints.append(
                    f"{where(importer, node)}: level {level(importer)} imports {found} of level {level(found)}"
                )
    return complaints


def test_imports_point_down() -> None:
    complaints = [line for name in MODULES if name != "moiety" for line in upward(name, parsed(name))]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("moiety.config", "import moiety.cli"),
        ("moiety.config", "def f():\n    from moiety.cli import main"),
        ("moiety.config", "if TYPE_CHECKING:\n    from moiety.cli import main"),
        ("moiety.config", "from .errors import ConfigError"),
        ("moiety.config", "from moiety import MoE"),
    ],
)
def test_the_level_check_sees_planted_imports(importer: str, line: str) -> None:
    assert upward(importer, ast.parse(line))


def test_levels_of_the_table() -> None:
    assert may_import("moiety.config", "moiety.errors")
    assert may_import("moiety.train.loop", "moiety.train.data")
    assert may_import("moiety.moe.layer", "moiety.observe.stats")
    assert not may_import("moiety.moe.layer", "moiety.observe.report")
    assert not may_import("moiety.train.loop", "moiety.infer.engine")
    assert not may_import("moiety.routing", "moiety.formats")
    assert level("moiety.observe") == level("moiety.observe.stats")


# The ground floor


def ground_floor() -> list[str]:
    return [name for name in MODULES if any(in_package(name, ground) for ground in GROUND_FLOOR)]


def test_ground_floor_names_no_heavy_package() -> None:
    complaints = [
        f"{where(name, node)}: {imported}"
        for name in ground_floor()
        for imported, node in imports(parsed(name))
        if imported.split(".")[0] in HEAVY
    ]
    assert not complaints, "\n".join(complaints)


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running `code`."""
    report = f"import sys\n{code}\nprint('LOADED', *sorted(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    closing = done.stdout.splitlines()[-1].split()
    assert closing[0] == "LOADED", done.stdout
    return set(closing[1:])


def test_ground_floor_runs_without_torch() -> None:
    assert loaded_after("\n".join(f"import {name}" for name in ["moiety", *ground_floor()])) == set()


def test_help_loads_no_torch() -> None:
    code = (
        "from moiety.cli import main\n"
        "sys.argv = ['moiety', '--help']\n"
        "try:\n    code = main()\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "assert not code, code"
    )
    assert loaded_after(code) == set()


def test_the_package_needs_no_test_oracle() -> None:
    complaints = [
        f"{where(name, node)}: {imported}"
        for name in MODULES
        for imported, node in imports(parsed(name))
        if imported.split(".")[0] in TEST_ORACLES
    ]
    assert not complaints, "\n".join(complaints)


# Sizes and names


def test_sizes() -> None:
    complaints = size.over_caps(size.load(ROOT))
    assert not complaints, "\n".join(complaints)


def test_size_tool_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "moiety"
    folder.mkdir()
    body = "".join(f"    x = {number}\n" for number in range(size.FUNCTION_LINES_MAX))
    (folder / "long.py").write_text(
        f'"""Doc."""\n\n\nclass A:\n    def fine(self):\n        pass\n\n\ndef f():\n{body}'
    )
    (folder / "page.html").write_text("<p>\n" * (size.FILE_LINES_MAX + 1))
    assert size.main(["--check", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"long.py:9: f has {size.FUNCTION_LINES_MAX + 1} lines" in said
    assert f"page.html: {size.FILE_LINES_MAX + 1} lines" in said
    assert "A.fine" not in said


@pytest.mark.parametrize("name", MODULES)
def test_module_has_docstring_and_sorted_all(name: str) -> None:
    tree = parsed(name)
    assert ast.get_docstring(tree), f"{where(name, tree)}: no module docstring"
    if name.endswith("__main__") or len(tree.body) == 1:  # a package's page of words exports nothing
        return
    lists = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [dotted(one) for one in node.targets] == ["__all__"]
    ]
    assert len(lists) == 1, f"{where(name, tree)}: needs exactly one `__all__ = [...]`"
    names = ast.literal_eval(lists[0])
    order = sorted(set(names), key=lambda one: (not one.isupper(), not one[0].isupper(), one))
    assert names == order, f"{where(name, lists[0])}: __all__ is {names}, in order it is {order}"
    module = importlib.import_module(name)
    missing = [one for one in names if getattr(module, one, module) is module]
    assert not missing, f"{where(name, lists[0])}: __all__ names {missing}, which do not exist"


# State and forbidden calls

MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}


def module_state(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """`global` anywhere, and lower-case names bound to something mutable when the module is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node, f"global {', '.join(node.names)}"
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            names, value = [dotted(one) for one in statement.targets], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            names, value = [dotted(statement.target)], statement.value
        else:
            continue
        called = dotted(value.func).rpartition(".")[2] if isinstance(value, ast.Call) else ""
        if isinstance(value, MUTABLE) or called in MUTABLE_CALLS:
            for one in names:
                if one != one.upper() and one != "__all__":
                    yield statement, f"module-level mutable `{one}`"


def raises_again(handler: ast.ExceptHandler) -> bool:
    """True if a handler cleans up and lets go: its last statement is a bare `raise`."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def raises_from(handler: ast.ExceptHandler) -> bool:
    """True if a handler ends in `raise ... from` what it caught."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.cause is not None and dotted(last.cause) == handler.name


def forbidden(tree: ast.Module, *, may_wrap: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """Calls, imports and handlers that the rules refuse."""
    for imported, statement in imports(tree):
        module, _, attribute = imported.rpartition(".")
        if imported.split(".")[0] in FORBIDDEN_IMPORTS or (module, attribute) in FORBIDDEN_NAMES:
            yield statement, f"import of {imported}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in FORBIDDEN_CALLS:
                yield node, f"{called}(): {FORBIDDEN_CALLS[called]}"
            for word in node.keywords:
                is_false = isinstance(word.value, ast.Constant) and word.value.value is False
                if word.arg in ("allow_pickle", "trust_remote_code", "shell") and not is_false:
                    yield node, f"{called}(): {word.arg} may only be False"
        elif isinstance(node, ast.Attribute) and dotted(node) in UNSAFE_LOADERS:
            yield node, f"{dotted(node)} builds any object; use yaml.SafeLoader or yaml.CSafeLoader"
        elif isinstance(node, ast.ExceptHandler):
            caught = ast.walk(node.type) if node.type else ()
            names = {dotted(one) for one in caught if isinstance(one, ast.expr)}
            catches_all = node.type is None or names & {"Exception", "BaseException"}
            if catches_all and not raises_again(node) and not (may_wrap and raises_from(node)):
                yield node, "catches everything: name the failures that can be handled"


def test_no_module_state_and_no_forbidden_call() -> None:
    complaints = [
        f"{where(name, node)}: {what}"
        for name in MODULES
        for node, what in [
            *module_state(parsed(name)),
            *forbidden(parsed(name), may_wrap=name in CATCHES_ALL_TO_RAISE),
        ]
    ]
    assert not complaints, "\n".join(complaints)


def test_scripts_have_no_forbidden_call_either() -> None:
    paths = [
        path for folder in ("bench", "recipes", "tools") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert paths
    complaints = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {what}"
        for path in paths
        for node, what in forbidden(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    "code",
    [
        "seen = []",
        "cache: dict[str, int] = {}",
        "cache = collections.defaultdict(list)",
        "def f():\n    global x\n    x = 1",
        "eval('1')",
        "torch.load('weights.pt')",
        "from torch import load",
        "import pickle",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load('x.npy', allow_pickle=True)",
        "jinja2.Environment()",
        "hasattr(x, 'y')",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept (ValueError, Exception):\n    pass",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_checks_see_planted_breaches(code: str) -> None:
    tree = ast.parse(code)
    assert [*module_state(tree), *forbidden(tree)]


def test_a_wrapping_handler_must_raise() -> None:
    raising = ast.parse("try:\n    f()\nexcept Exception as error:\n    raise FormatError('x') from error")
    silent = ast.parse("try:\n    f()\nexcept Exception as error:\n    print(error)")
    assert not [*forbidden(raising, may_wrap=True)]
    assert [*forbidden(raising)]
    assert [*forbidden(silent, may_wrap=True)]
    assert not [*forbidden(ast.parse("try:\n    f()\nexcept BaseException:\n    g()\n    raise"))]


@pytest.mark.parametrize(
    "code",
    [
        "ROUTERS = {}",
        "__all__ = []",
        "x = 1",
        "np.load('x', allow_pickle=False)",
        "model.eval()",
        "re.compile('a')",
    ],
)
def test_the_checks_leave_good_code_alone(code: str) -> None:
    tree = ast.parse(code)
    assert not [*module_state(tree), *forbidden(tree)]


# Documents

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md", "CHANGELOG.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def repository_files() -> list[str]:
    """Tracked files, and those that would be if they were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return sorted({name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()})


def file_map() -> set[str]:
    """Paths in the README's file map.

    It is the fenced block under the heading that holds the words "file map"; a line is a path from
    the repository's root (folders end in `/`), then words about it.
    """
    section = re.search(r"^#+ .*file map.*?$(.*?)(?=^#|\Z)", read("README.md"), re.I | re.M | re.S)
    assert section, "README.md has no heading with the words 'File map'"
    block = re.search(r"^```\w*\n(.*?)^```", section[1], re.M | re.S)
    assert block, "README.md: no fenced block under 'File map'"
    return {line.split()[0] for line in block[1].splitlines() if line.strip()}


def test_file_map_is_true_and_whole() -> None:
    listed = file_map()
    gone = sorted(path for path in listed if not (ROOT / path).exists())
    assert not gone, f"README.md's file map names what is not there: {gone}"
    inside = {
        f"moiety/{path.name}{'/' if path.is_dir() else ''}"
        for path in PACKAGE.iterdir()
        if path.name not in ("__init__.py", "__main__.py", "py.typed", "__pycache__")
        and (path.is_file() or any(path.rglob("*.py")))
    }
    left_out = sorted(inside - listed)
    assert not left_out, f"README.md's file map leaves out {left_out}"


def commands_named(text: str, program: str) -> set[str]:
    """Words after `program` in code: fenced blocks and back-quoted pieces, never prose."""
    code = re.findall(r"^```.*?^```", text, re.M | re.S)
    code += re.findall(r"`[^`\n]+`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    pattern = rf"(?:^|[\s`/]){program} ([a-z][a-z0-9-]*)"
    return {word for piece in code for word in re.findall(pattern, piece)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_exist(document: str) -> None:
    commands = {path.stem.replace("_", "-") for path in (PACKAGE / "cli").glob("*.py")}
    unknown = sorted(commands_named(read(document), "moiety") - commands - {"import"})
    assert not unknown, f"{document} names `moiety {unknown}`; moiety/cli/ has {sorted(commands)}"
    targets = set(re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.M))
    unknown = sorted(commands_named(read(document), "make") - targets)
    assert not unknown, f"{document} names `make {unknown}`; the Makefile has {sorted(targets)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document: str) -> None:
    folders = "bench|docs|moiety|recipes|tests|tools"
    named = set(re.findall(rf"(?<![\w./])((?:{folders})/[\w./-]*\w)", read(document)))
    gone = sorted(path for path in named if not (ROOT / path).exists())
    assert not gone, f"{document} names {gone}"


def test_make_targets_are_declared_phony() -> None:
    text = read("Makefile")
    targets = set(re.findall(r"^([a-z-]+):.*##", text, re.M))
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert phony and set(phony[1].split()) == targets


def test_changelog_has_this_version() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    versions = re.findall(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.M)
    assert versions and versions[0] == version


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    installed = [*project["dependencies"]]
    for extra in ("dev", "report", "demo", "serve", "eval"):
        installed += project["optional-dependencies"][extra]
    pinned = set(re.findall(r"^([a-z0-9-]+)==", read("constraints.txt"), re.M))
    wanted = {re.split(r"[<>=!~\[; ]", line)[0].lower().replace("_", "-") for line in installed}
    assert wanted <= pinned, f"constraints.txt lacks {sorted(wanted - pinned)}"


def test_no_path_of_one_machine() -> None:
    places = re.compile(
        "|".join(f"(?<![\\w.])/{place}/" for place in ("work", "root", "farm", "home", "tmp/v"))
    )
    complaints = []
    for name in repository_files():
        data = (ROOT / name).read_bytes()
        if b"\0" not in data:
            for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
                if places.search(line):
                    complaints.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not complaints, "\n".join(complaints)


def test_agents_page_is_short() -> None:
    assert len(read("AGENTS.md").splitlines()) <= 40
    assert read("CLAUDE.md").strip() == "@AGENTS.md"


def test_every_bench_is_quick_and_documented() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    scripts = [path for path in sorted((ROOT / "bench").glob("*.py")) if not path.name.startswith("_")]
    assert scripts, "bench/ is empty"
    for script in scripts:
        assert "arguments(__doc__" in script.read_text(encoding="utf-8"), (
            f"bench/{script.name} has no --quick"
        )
        assert f"bench/{script.name}" in text, f"bench/{script.name} is named in neither README.md nor docs/"

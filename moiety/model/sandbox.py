"""A sandbox for templates that nobody here wrote: what they may reach, and how much they may do.

jinja2's immutable sandbox keeps a template away from Python's insides, but lets it fill the memory or run for
hours with one expression. Here every value has a largest size, checked where it is made; every turn of a loop,
call, filter and comparison is counted; and the processor time is bounded. So a template ends, soon.
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any, cast, final

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from moiety.model.clock import own_time

__all__ = [
    "CPU_SECONDS",
    "DEPTH",
    "GENERATION_MARKS",
    "STEPS",
    "TEXT_CHARACTERS",
    "Refused",
    "Sandbox",
    "TooMuch",
    "bound",
]

STEPS = 1_000_000
CPU_SECONDS = 1.0  # without garbage collection
TEXT_CHARACTERS = 2_000_000  # of one value, and of everything written together
ITEMS = 100_000
GENERATION_MARKS = (
    "generation_begins",
    "generation_ends",
)  # variables that are written around `{% generation %}`
DEPTH = 64
WIDTH = 1000
INTEGER_BITS = 4096
CHARACTERS_PER_STEP = 64
CHARACTERS_PER_SECOND = 5e6


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STRING_METHODS = _words(
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha "
    "isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join "
    "ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit "
    "rstrip split splitlines startswith strip swapcase title upper zfill"
)
_FILTERS = _words(
    "abs attr batch capitalize count d default dictsort e escape first float groupby indent int items "
    "last length list lower map max min reject rejectattr reverse round safe select selectattr slice sort "
    "string title trim truncate unique upper urlencode wordcount"
)
_WIDE = frozenset({"batch", "indent", "round", "slice", "tojson"})  # filters whose numbers are widths
# `%%`, or a conversion: a name in parentheses, flags, and what says width and precision.
_PERCENT = re.compile(r"%(?:%|(?:\([^()]*[()])?[-+ #0]*([0-9*.]*))")
_FORBIDDEN_NODES = (
    nodes.Block,
    nodes.EvalContextModifier,
    nodes.Extends,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
)


class TooMuch(TemplateRuntimeError):
    """A limit was passed; the message says which."""


class Refused(TemplateRuntimeError):
    """What the template itself raised: these messages are not for it."""


def bound(tree: nodes.Template, sandbox: Sandbox) -> nodes.Template:
    """The template with its loops, literals, comparisons and joins going through the sandbox's counters.

    Raises:
        SecurityError: it has a statement that templates of messages have no use for.
    """
    for node in tree.find_all(_FORBIDDEN_NODES):
        raise SecurityError(f"line {node.lineno}: {type(node).__name__.lower()} is not allowed here")
    bounded = _Bounding().visit(tree)
    assert isinstance(bounded, nodes.Template), bounded
    bounded.set_environment(sandbox)
    return bounded


def _hook(name: str, line: int, *values: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(values), [], None, None, lineno=line)


def _turn(line: int, characters: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_hook("turn", line, nodes.Const(characters, lineno=line)), lineno=line)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {str(name)[:80]!r}")


def _check_width(spec: str) -> None:
    """Refuse a width or precision of more than three digits in the format of one value."""
    if re.search(r"[0-9]{4}", spec):
        raise TooMuch(f"a format with a width of {WIDTH} or more")


def _check_percent(text: str) -> None:
    """The same in each conversion of `text % values`; a width taken from a value is refused too."""
    for found in _PERCENT.finditer(text):
        width = found[1] or ""
        if "*" in width or "(" in found[0][2:]:
            raise TooMuch("a format whose width is not written in it")
        _check_width(width)


def _is_view(value: object) -> bool:
    """`keys()`, `values()` and `items()` of a dictionary; the first and the last are sets already."""
    return isinstance(value, type({}.values()))


@final
class _Bounding(NodeTransformer):
    """Puts the sandbox's hooks where jinja2 has none of its own."""

    def _repeated(self, node: Any) -> Any:
        """A body that may run many times: each time counts."""
        self.generic_visit(node)
        node.body.insert(0, _turn(node.lineno, 0))
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Also the test of a filtered loop is a turn."""
        looped: nodes.For = self._repeated(node)
        if looped.test is not None:
            looped.test = nodes.And(_turn(looped.lineno, 0).node, looped.test, lineno=looped.lineno)
        return looped

    visit_Macro = _repeated
    visit_CallBlock = _repeated

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        """Text of the template's own is counted as it is written, like that of values."""
        self.generic_visit(node)
        characters = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [_turn(node.lineno, characters), node] if characters else [node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        """`a ~ b`."""
        self.generic_visit(node)
        return _hook("concatenated", node.lineno, *node.nodes)

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _hook("checked", node.lineno, node)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Comparing takes as long as the values are large."""
        self.generic_visit(node)
        node.expr = _hook("checked", node.lineno, node.expr)
        for operand in node.ops:
            operand.expr = _hook("checked", node.lineno, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        """A slice is a copy."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _hook("checked", node.lineno, node.node)
        return node


@final
class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training: what is inside, between two variables."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements up to `endgeneration`, in a scope of their own; nobody who sets no marks sees any."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (
            nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line) for name in GENERATION_MARKS
        )
        return nodes.Scope([before, *body, after], lineno=line)


@final
class _Items:
    """What a lazy filter gives, worked out already; like the generator it replaces it is true and has no length."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        self._iterator = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self._iterator

    def __next__(self) -> Any:
        return next(self._iterator)


@final
class _Namespace(Namespace):
    """`namespace()`: no names that begin with an underscore, and nothing of what it holds in its text."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


@final
class _Dictionary:
    """`dict`, as a function and with `fromkeys`, without the class and its insides."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """A dictionary with one value for all keys."""
        return dict.fromkeys(keys, value)


@final
class _Formatter(SandboxedFormatter):
    """`str.format` whose pieces are counted as they come."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self._sandbox = sandbox

    def format_field(self, value: Any, format_spec: str) -> Any:
        """One piece; its width is bounded before it is made."""
        _check_width(format_spec)
        written = super().format_field(value, format_spec)
        self._sandbox.turn(len(written))
        return written


@final
class _Format:
    """`"...".format`, when a template asks for it."""

    def __init__(self, sandbox: Sandbox, text: str, is_map: bool) -> None:
        self._sandbox, self._text, self._is_map = sandbox, text, is_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._is_map:
            if kwargs or len(args) != 1:
                raise TypeError("format_map() takes one argument")
            return self._formatted((), args[0])
        return self._formatted(args, kwargs)

    def _formatted(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        return type(self._text)(_Formatter(self._sandbox).vformat(self._text, args, kwargs))


# What may be called on which kind of value; the first kind that fits decides.
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (LoopContext, frozenset({"cycle", "changed"})),
    (Cycler, frozenset({"next", "reset"})),
    (_Dictionary, frozenset({"fromkeys"})),
    (str, _STRING_METHODS),
    (dict, frozenset({"copy", "get", "items", "keys", "values"})),
    (list, frozenset({"copy", "count", "index"})),
    (tuple, frozenset({"count", "index"})),
    (range, frozenset({"count", "index"})),
    (float, frozenset({"is_integer"})),
)
_CALLABLE = (Macro, LoopContext, Cycler, Joiner, Undefined, _Dictionary, _Format)


@final
class Sandbox(ImmutableSandboxedEnvironment):
    """One rendering's environment: what it has used so far is counted here.

    Args:
        given_characters: Size of what is rendered; a value may be so much larger.
    """

    intercepted_binops: frozenset[str] = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, given_characters: int = 0) -> None:
        self._steps = 0
        self._written = 0
        self._largest = TEXT_CHARACTERS + 8 * given_characters
        self._most_steps = STEPS + given_characters
        self._until = own_time() + CPU_SECONDS + given_characters / CHARACTERS_PER_SECOND
        self._known: dict[int, tuple[int, int, Any]] = {}
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            finalize=self.written,
            extensions=[_Generation, loopcontrols],
        )
        own: dict[str, Callable[..., Any]] = {
            "format": self._format,
            "join": self._join,
            "replace": self._replace,
            "sum": self._sum,
            "tojson": self._tojson,
        }
        allowed = {name: one for name, one in self.filters.items() if name in _FILTERS}
        self.filters = {name: self._guarded(name, one) for name, one in {**allowed, **own}.items()}
        tests = cast(dict[str, Any], self.tests)
        self.tests = {name: self._guarded(name, one) for name, one in tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "cycler": Cycler,
            "joiner": Joiner,
            "dict": _Dictionary(),
            "namespace": _Namespace,
            "raise_exception": self._raise_exception,
            "strftime_now": self._strftime_now,
        }

    # Counting

    def turn(self, characters: int = 0) -> bool:
        """Count one step, and text that it makes.

        Raises:
            TooMuch: too many, too much, or too long.
        """
        self._steps += 1 + characters // CHARACTERS_PER_STEP
        self._written += characters
        if self._steps > self._most_steps:
            raise TooMuch(f"more than {self._most_steps:,} steps")
        if self._written > self._largest:
            raise TooMuch(f"more than {self._largest:,} characters of text")
        if own_time() > self._until:
            raise TooMuch(f"more than {CPU_SECONDS} s of processor time")
        return True

    def checked(self, value: Any) -> Any:
        """The value, when it is not too large; a lazy one is worked out.

        Raises:
            TooMuch: it is.
        """
        if isinstance(value, Iterator) and not isinstance(value, (_Items, Undefined)):
            value = _Items(self._listed(value))
        self.turn()
        size, depth = self._measure(value)
        self._steps += size // CHARACTERS_PER_STEP
        if size > self._largest:
            raise TooMuch(f"a value of more than {self._largest:,} characters")
        if depth > DEPTH:
            raise TooMuch(f"values nested more than {DEPTH} deep")
        return value

    def written(self, value: Any) -> str:
        """A value as the text that goes into the output."""
        text = str(self.checked(value))
        self.turn(len(text))
        return text

    def concatenated(self, *values: Any) -> str:
        """`a ~ b ~ c`."""
        return "".join([self.written(value) for value in values])

    def _measure(self, value: Any) -> tuple[int, int]:
        """About how many characters a value has when written, and how deeply it is nested."""
        if isinstance(value, str):
            return len(value) + 2, 0
        if isinstance(value, int):
            return 2 + value.bit_length() // 3, 0
        if isinstance(value, _Items):
            value = value._items
        parts: Iterable[Any]
        if isinstance(value, Mapping):
            parts = (part for pair in value.items() for part in pair)
        elif isinstance(value, (list, tuple, AbstractSet, types.MappingProxyType)) or _is_view(value):
            parts = value
        else:
            return (8 * len(value), 0) if isinstance(value, range) else (32, 0)
        known = self._known.get(id(value))
        if known is not None:
            return known[:2]
        if len(value) > ITEMS + self._largest - TEXT_CHARACTERS:
            raise TooMuch(f"a value of more than {ITEMS:,} items")
        self._steps += len(value) // 8
        size, depth = 2, 0
        for part in parts:
            one_size, one_depth = self._measure(part)
            size, depth = size + 2 + one_size, max(depth, one_depth)
        # Nothing in here can change once made, so its size holds; the reference keeps its id its own.
        self._known[id(value)] = (size, depth + 1, value)
        return size, depth + 1

    def _listed(self, values: Iterable[Any]) -> list[Any]:
        """All of them."""
        items = []
        for value in values:
            self.turn()
            items.append(value)
        return items

    # What jinja2 asks before it does something

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call something, if templates may."""
        for name in ("_loop_vars", "_block_vars"):  # for functions that ask for the context: there are none
            kwargs.pop(name, None)
        owner = getattr(called, "__self__", None)
        if owner is self:
            return called(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            self.checked(value)
        if isinstance(called, (types.BuiltinMethodType, types.MethodType)) and owner is not None:
            name = called.__name__
            allowed = next((names for kind, names in _METHODS if isinstance(owner, kind)), frozenset())
            if name not in allowed:
                raise SecurityError(f"{name} of {type(owner).__name__} may not be called here")
            if isinstance(owner, str):
                args = self._room_for_method(owner, name, args)
        elif not (
            isinstance(called, _CALLABLE) or called in (self.globals["range"], _Namespace, Cycler, Joiner)
        ):
            raise SecurityError(f"{type(called).__name__} may not be called here")
        return self.checked(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation, if its result is not too large."""
        self.checked(left)
        self.checked(right)
        if operator == "%" and isinstance(left, str):
            _check_percent(left)
            self._room((left.count("%") + 1) * self._measure(right)[0] + WIDTH * left.count("%"))
        elif operator in ("*", "**"):
            self._room_for_product(operator, left, right)
        elif operator == "+":
            self._room(self._measure(left)[0] + self._measure(right)[0])
        return self.checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` and `format_map` of a string, counted."""
        if not isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            return None
        owner: Any = value.__self__
        if value.__name__ not in ("format", "format_map") or not isinstance(owner, str):
            return None
        return _Format(self, owner, value.__name__ == "format_map")

    def _room(self, characters: int) -> None:
        if characters > self._largest:
            raise TooMuch(f"a value of more than {self._largest:,} characters")

    def _room_for_product(self, operator: str, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * max(right, 1)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if bits > INTEGER_BITS:
                raise TooMuch(f"a number of more than {INTEGER_BITS} bits")
        for repeated, times in ((left, right), (right, left)):
            if isinstance(times, int) and not isinstance(repeated, (int, float)):
                size = len(repeated) if isinstance(repeated, str) else self._measure(repeated)[0]
                self._room(size * max(times, 1))

    def _room_for_method(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Check what a method of a string is going to make; its arguments, worked out."""
        self.checked(text)
        if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            width = max((one for one in args if isinstance(one, int)), default=8)
            self._room(len(text) + width * (1 + text.count("\t") if name == "expandtabs" else 1))
        elif name == "replace" and len(args) > 1:
            self._room_for_replace(text, args[0], args[1])
        elif name == "join" and args:
            items = list(args[0])
            self._room(self._measure(items)[0] + len(text) * len(items))
            args = (items, *args[1:])
        return args

    def _room_for_replace(self, text: str, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self._room(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    # Filters

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            for number, value in enumerate((*args[first:], *kwargs.values())):
                self.checked(value)
                if number and isinstance(value, int) and name in _WIDE:
                    self._room_for_width(value)
            if name == "indent":
                self._room_for_indent(*args[first:], **kwargs)
            return self.checked(function(*args, **kwargs))

        return guarded

    def _room_for_width(self, value: int) -> None:
        if abs(value) > WIDTH:
            raise TooMuch(f"a width above {WIDTH}")

    def _room_for_indent(self, text: Any, width: Any = 4, *rest: Any, **more: Any) -> None:
        lines = 1 + str(text).count("\n")
        self._room(lines * (len(width) if isinstance(width, str) else WIDTH))

    def _join(self, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
        getter = (lambda one: one) if attribute is None else make_attrgetter(self, attribute)
        between = str(d)
        pieces = []
        for one in value:
            pieces.append(self.written(getter(one)))
            self.turn(len(between))
        return between.join(pieces)

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(s), str(old), str(new)
        self._room_for_replace(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise TypeError("format takes values by position or by name, not both")
        text, given = str(value), kwargs or args
        _check_percent(text)
        self._room((text.count("%") + 1) * self._measure(given)[0] + WIDTH * text.count("%"))
        return text % given

    def _sum(self, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
        if isinstance(start, str):
            raise TypeError("sum adds numbers or lists; for strings there is join")
        getter = (lambda one: one) if attribute is None else make_attrgetter(self, attribute)
        total = start
        for one in iterable:
            total = self.checked(total + self.checked(getter(one)))
        return total

    def _tojson(
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as it is, without HTML's escapes."""
        if indent is not None:
            steps = len(indent) if isinstance(indent, str) else max(indent, 0)
            size, depth = self._measure(x)
            self._room(size * (1 + steps * depth // 4))
        text = json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        self._room(len(text))
        return text

    def _raise_exception(self, message: object = "") -> None:
        raise Refused(self.written(message)[:1000])

    def _strftime_now(self, format: str) -> str:
        self._room_for_width(len(format))
        return datetime.now().strftime(format)

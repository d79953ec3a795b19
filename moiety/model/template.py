"""Chat templates: messages into the text that a model was taught to continue.

A template is a program in jinja2 that came with somebody's weights. It runs only in `moiety.model.sandbox`, under
limits of length, steps, text and time; what it gives is what transformers' `apply_chat_template` gives.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from jinja2 import environment
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from moiety import storage
from moiety.errors import FormatError, UsageError
from moiety.model.sandbox import DEPTH, Refused, Sandbox, bound

__all__ = ["ChatTemplate", "render", "special_tokens"]

TEMPLATE_CHARACTERS = 100_000
TEMPLATE_TOKENS = 15_000
SINGLE = "chat_template.jinja"
SEVERAL = "additional_chat_templates"
DEFAULT = "default"
TOOL_USE = "tool_use"
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A message's reasoning goes by several names; a template knows one of them.
REASONING = ("reasoning_content", "thinking", "reasoning")
# What a program in the sandbox can raise: its own errors, and those of the values it computes with.
FAILURES = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **more: Any,
) -> str:
    """Render messages with one template.

    Args:
        template: Its text.
        messages: Each with a `role`, and `content` as a string or as a list of parts.
        add_generation_prompt: End with the words that begin an answer.
        tools: Functions that the model may call, as JSON schemas.
        more: Further variables, such as `bos_token` or `enable_thinking`; plain JSON values.

    Raises:
        FormatError: the template is not one, fails, or does too much.
        UsageError: the messages are not messages, or the template refuses them.
    """
    return ChatTemplate(template).render(
        messages, add_generation_prompt=add_generation_prompt, tools=tools, **more
    )


@final
class ChatTemplate:
    """A model's template, or its several by name; each is compiled once, when it is first rendered.

    Args:
        templates: The text; or texts by name, of which `default` and `tool_use` are chosen by what is rendered.
        special_tokens: Variables that every template gets, such as `bos_token`.
        origin: Where it came from, for errors.

    Raises:
        FormatError: there is no template.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "the chat template",
    ) -> None:
        self.templates = {DEFAULT: templates} if isinstance(templates, str) else dict(templates)
        self.special_tokens = dict(special_tokens or {})
        self._origin = origin
        if not self.templates:
            raise FormatError(f"{origin}: there is no template in it")
        self._codes: dict[str, types.CodeType] = {}

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of a checkpoint: `chat_template.jinja`, else that of `tokenizer_config.json`; None without one.

        Raises:
            FormatError: it cannot be read.
            StorageError: the system refused to read.
        """
        path = Path(folder)
        config_file = path / "tokenizer_config.json"
        config = storage.read_json(config_file) if config_file.is_file() else {}
        named = _templates_in(config.get("chat_template"), config_file)
        file = path / SINGLE
        if file.is_file():
            named[DEFAULT] = _read_text(storage.inside(path, SINGLE))
        for one in sorted((path / SEVERAL).glob("*.jinja")):
            named[one.stem] = _read_text(storage.inside(path, f"{SEVERAL}/{one.name}"))
        if not named:
            return None
        origin = str(file if file.is_file() else config_file)
        return cls(named, special_tokens=special_tokens(config), origin=origin)

    @property
    def text(self) -> str | None:
        """The text of the default template."""
        return self.templates.get(DEFAULT)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        """The text of messages; arguments and errors as for the function `render`."""
        chat = _checked_messages(messages)
        given = {
            **self.special_tokens,
            "documents": None,
            **_plain(more, "a variable of the template", 0),
            "messages": chat,
            "tools": _checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        name = self._choose(tools is not None)
        if name not in self._codes:
            self._codes[name] = _compiled(self.templates[name], self._named(name))
        sandbox = Sandbox(_characters(given))
        template = sandbox.template_class.from_code(sandbox, self._codes[name], dict(sandbox.globals))
        try:
            return "".join(template.root_render_func(template.new_context(given)))
        except Refused as error:
            raise UsageError(
                f"{self._named(name)} refuses these messages: {error.message}",
                hint="the model was taught another order of roles",
            ) from error
        except FAILURES as error:
            raise _failure(self._named(name), error, template) from error

    def marks_answers(self, *, with_tools: bool = False) -> bool:
        """True if the template says by `{% generation %}` which words are the assistant's."""
        return GENERATION.search(self.templates[self._choose(with_tools)]) is not None

    def save(self, folder: str | Path) -> None:
        """Write `chat_template.jinja`, and further templates where transformers looks for them.

        Raises:
            StorageError: the system refused.
        """
        for name, text in self.templates.items():
            if name == DEFAULT:
                file = Path(folder) / SINGLE
            else:
                if not re.fullmatch(r"[\w-]+", name):
                    raise FormatError(
                        f"{self._origin} names a template {name!r:.80}, which cannot be a file's name"
                    )
                file = Path(folder) / SEVERAL / f"{name}.jinja"
            storage.write_atomically(file, text.encode())

    def _choose(self, with_tools: bool) -> str:
        wanted = TOOL_USE if with_tools and TOOL_USE in self.templates else DEFAULT
        if wanted not in self.templates:
            raise UsageError(
                f"{self._origin} has templates {', '.join(sorted(self.templates))}, and none is called {DEFAULT!r}",
                hint="render the one you want by its text",
            )
        return wanted

    def _named(self, name: str) -> str:
        return self._origin if name == DEFAULT else f"{self._origin} ({name})"


def _compiled(text: str, origin: str) -> types.CodeType:
    """The template as code that goes through the sandbox's counters."""
    if not isinstance(text, str):
        raise FormatError(f"{origin} is {type(text).__name__}, not text")
    if len(text) > TEMPLATE_CHARACTERS:
        raise FormatError(
            f"{origin} has {len(text):,} characters; allowed are {TEMPLATE_CHARACTERS:,}",
            hint="is it a chat template?",
        )
    sandbox = Sandbox()
    try:
        for number, _ in enumerate(sandbox.lexer.tokeniter(text, None)):
            if number > TEMPLATE_TOKENS:
                raise FormatError(
                    f"{origin} has more than {TEMPLATE_TOKENS:,} tokens", hint="is it a chat template?"
                )
        code = sandbox.compile(bound(sandbox.parse(text), sandbox))
    except FAILURES as error:
        raise _failure(origin, error, None) from error
    assert isinstance(code, types.CodeType), code
    return code


def _failure(origin: str, error: BaseException, template: environment.Template | None) -> FormatError:
    """What went wrong and in which line; a template cannot make the message long."""
    line = error.lineno if isinstance(error, TemplateSyntaxError) else _line(error, template)
    said = error.message if isinstance(error, TemplateError) else str(error)
    if isinstance(error, RecursionError):
        said = "nested too deeply"
    elif isinstance(error, MemoryError) or not said:
        said = "too large to be compiled" if template is None else type(error).__name__
    place = f", line {line}" if line else ""
    return FormatError(f"{origin}{place}: {said[:500]}", hint="is it made for transformers?")


def _line(error: BaseException, template: environment.Template | None) -> int:
    """The line of the template that was at work."""
    line, trace = 0, error.__traceback__
    while trace is not None and template is not None:
        if trace.tb_frame.f_globals is template.root_render_func.__globals__:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain copies, without what is None, and with the reasoning under all its names.

    Raises:
        UsageError: they are not messages.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UsageError(
            f"messages is {type(messages).__name__}, not a list", hint="[{'role': 'user', 'content': '...'}]"
        )
    if not messages:
        raise UsageError("there is no message", hint="give at least one")
    chat = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UsageError(
                f"{where} is {type(message).__name__}, not an object",
                hint="{'role': 'user', 'content': '...'}",
            )
        plain = {key: value for key, value in _plain(message, where, 0).items() if value is not None}
        _check_message(plain, where)
        reasoning = next((plain[name] for name in REASONING if name in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        chat.append(plain)
    return chat


def _check_message(message: Mapping[str, Any], where: str) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UsageError(f"{where} has role {role!r:.80}", hint="user, assistant, system or tool")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise UsageError(
                    f"{where} has a part that is {part!r:.80}", hint="{'type': 'text', 'text': '...'}"
                )
    elif content is not None and not isinstance(content, str):
        raise UsageError(
            f"{where} has content of type {type(content).__name__}", hint="a string, or a list of parts"
        )


def _checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise UsageError(f"tools is {type(tools).__name__}, not a list", hint="a list of JSON schemas")
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UsageError(
                f"tool {number} is {type(tool).__name__}, not an object",
                hint="{'type': 'function', 'function': {...}}",
            )
    return [_plain(tool, f"tool {number}", 0) for number, tool in enumerate(tools)]


def _plain(value: Any, where: str, depth: int) -> Any:
    """A copy made of JSON's types alone, so that a template meets no object with methods of its own.

    Raises:
        UsageError: it is not JSON, or nested too deeply.
    """
    if depth > DEPTH // 2:
        raise UsageError(f"{where} is nested more than {DEPTH // 2} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise UsageError(f"{where} has a key that is not a string")
        return {str.__str__(key): _plain(one, where, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, where, depth + 1) for one in value]
    raise UsageError(
        f"{where} holds {type(value).__name__}, which is not JSON", hint="strings, numbers, lists, objects"
    )


def _characters(value: Any) -> int:
    """About how long a plain value is."""
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, dict):
        return sum(_characters(key) + _characters(one) for key, one in value.items())
    if isinstance(value, list):
        return sum(map(_characters, value))
    return 8


def _templates_in(value: Any, file: Path) -> dict[str, str]:
    """`chat_template` of a `tokenizer_config.json`: nothing, a text, or a list of named texts."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    found: dict[str, str] = {}
    for one in value if isinstance(value, list) else [value]:
        name, text = (one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise FormatError(
                f"{file}: chat_template has {one!r:.80}",
                hint="allowed is a text, or a list of objects with name and template",
            )
        found[name] = text
    return found


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a `tokenizer_config.json` names."""
    found = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _read_text(file: Path) -> str:
    """A template file, bounded before it is read."""
    size = file.stat().st_size
    if size > 4 * TEMPLATE_CHARACTERS:
        raise FormatError(
            f"{file} has {size:,} bytes; a template has at most {TEMPLATE_CHARACTERS:,} characters"
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error

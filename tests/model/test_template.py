"""Chat templates: equal to transformers' on every style, quick and harmless on those that mean harm."""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from moiety.errors import FormatError, StorageError, UsageError
from moiety.model import sandbox
from moiety.model.clock import own_time
from moiety.model.template import ChatTemplate, render, special_tokens
from tests.model.chat_templates import CHATS, TEMPLATES, TOOLS
from tests.model.hostile_templates import ESCAPES, EXHAUSTING

USER = [{"role": "user", "content": "hi"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def by_transformers(template: str, messages: Sequence[dict[str, Any]], **more: Any) -> str:
    """What `apply_chat_template` gives: it drops what is None before it renders."""
    chat = [{key: value for key, value in one.items() if value is not None} for one in messages]
    rendered, _ = render_jinja_template([chat], chat_template=template, **more)
    text = rendered[0]
    assert isinstance(text, str)
    return text


# What it gives


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_equal_to_transformers(template: str, chat: str) -> None:
    text, messages = TEMPLATES[template], CHATS[chat]
    for tools in (None, TOOLS):
        for prompt in (True, False):
            for more in (
                {},
                {"enable_thinking": False, "documents": [{"title": "a", "text": "<b> and more" * 3}]},
            ):
                given_ = {"add_generation_prompt": prompt, "tools": tools, **TOKENS, **more}
                expected = by_transformers(text, messages, **given_)
                assert expected.strip(), (template, chat)
                assert render(text, messages, **given_) == expected


def test_the_styles_differ() -> None:
    """None of the comparisons is of two empty texts or of one text twice."""
    texts = {render(text, CHATS["tools"], tools=TOOLS, **TOKENS) for text in TEMPLATES.values()}
    assert len(texts) == len(TEMPLATES) and min(map(len, texts)) > 20


@pytest.mark.parametrize(
    "expression",
    [
        "'2024: **%s** 100%% 5000' % 'x'",
        "'%05.2f|%-4s|%+d' % (1.5, 'b', 3)",
        "'{:*^10}|{!r}'.format('a', 'b')",
        "'{a[0]}{b[x]}{c}'.format(a=[1], b={'x': 2}, c='y')",
        "('a,b;c' | replace(',', ';')).split(';')",
        "'ab'.join(['x', 'y']) ~ 'a'.center(5) ~ '7'.zfill(3) ~ 'a\tb'.expandtabs(4)",
        "[1, 2] + [3] == [1, 2, 3] and (1, 2) != (1, 3) and 'a' in 'cat' and 2 not in {1: 2}",
        "'<b>' | safe ~ ('<i>' | e) + '<u>'",
        "messages | selectattr('nothing') | list | length",
        "[3, 1, 2] | sort | reverse | list",
        "'x' * 3 ~ 2 ** 8 ~ 7 % 4 ~ -1 // 2 ~ 1.5 * 2",
        "messages | map('length') | list",
        "dict([['a', 1]], b=2)",
        "dict.fromkeys(['a', 'b'], 0)",
        "[[1], [2]] | map('first') | join('-')",
        "[1, 2, 3, 4, 5] | slice(2) | list ~ ([1, 2, 3] | batch(2, 'x') | list)",
        "'a\nb\nc' | indent(3, true) ~ ('x y' | title) ~ ('abc' | truncate(5))",
        "'é' | urlencode ~ ('1e3' | float) ~ ('0x1f' | int(0, 16))",
        "[{'a': {'b': 1}}] | map(attribute='a.b') | sum",
        "missing ~ missing | default('d') ~ (missing is defined) ~ (none is none)",
        "range(1, 10, 3) | list ~ (range(3) | last) ~ ('abc' | first)",
        "[true, false, none, 1.5, 'a\u2028\"<'] | tojson",
        "(messages[0].items() | list) ~ messages[0].get('x', 'y')",
        "5 is divisibleby(5) and 4 is even and 'a' is string and [] is sequence and {} is mapping",
    ],
)
def test_expressions_are_those_of_transformers(expression: str) -> None:
    text = "{{ " + expression + " }}"
    assert render(text, USER) == by_transformers(text, USER, add_generation_prompt=True)


def test_the_date() -> None:
    text = "{{ strftime_now('%Y') }}"
    assert render(text, USER) == by_transformers(text, USER)


def test_reasoning_goes_by_every_name() -> None:
    text = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        messages = [{"role": "assistant", "content": "x", name: "why"}]
        assert render(text, messages) == "whywhy" == by_transformers(text, messages)


def test_the_templates_own_words() -> None:
    assert render("a\n{% if true %}\n  b\n  {% endif %}\nc", USER) == "a\n  b\nc"
    assert render("", USER) == ""


def test_long_conversations() -> None:
    """Limits are for templates, not for people: thousands of messages, or a whole book."""
    many = [{"role": ("user", "assistant")[i % 2], "content": f"message {i} " * 20} for i in range(2000)]
    book = [{"role": "user", "content": "a word and \n another, " * 300_000}]
    for name in ("chatml", "thinking", "mistral", "batches"):
        for messages in (many, book):
            assert render(TEMPLATES[name], messages, **TOKENS) == by_transformers(
                TEMPLATES[name], messages, add_generation_prompt=True, **TOKENS
            )


def test_threads_do_not_share_limits() -> None:
    template = ChatTemplate(TEMPLATES["thinking"])
    expected = template.render(CHATS["turns"])
    wrong = []

    def work() -> None:
        wrong.extend(text for _ in range(20) if (text := template.render(CHATS["turns"])) != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_garbage_of_the_process_is_not_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection walks every object of the process: with millions it takes longer than a template may."""
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 0.02)
    kept = [[number] for number in range(500_000)]
    begun = time.thread_time()
    gc.collect()
    assert time.thread_time() - begun > 0.02 and kept

    def collects(_: sandbox.Sandbox, format: str) -> str:
        gc.collect()
        return f"{format} collected"

    monkeypatch.setattr(sandbox.Sandbox, "_strftime_now", collects)
    assert render("{{ strftime_now('all') }} {{ 1 + 1 }}", USER) == "all collected 2"


# What it refuses


@pytest.mark.parametrize("name", EXHAUSTING)
def test_exhausting_templates_end(name: str) -> None:
    begun = own_time()
    with pytest.raises(FormatError, match="the chat template") as refused:
        render(EXHAUSTING[name], USER)
    assert own_time() - begun < 2.5
    assert len(str(refused.value)) < 1000 and refused.value.hint


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_outside_is_reached(name: str) -> None:
    events: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event.partition(".")[0] in ("open", "os", "subprocess", "socket", "import"):
            events.append(f"{event} {arguments}")

    sys.addaudithook(watch)
    try:
        with pytest.raises(FormatError):
            render(ESCAPES[name], USER)
    finally:
        watching.clear()
    assert not events


WORDS = re.findall(
    r"\S+",
    """{% %} {{ }} {%- -%} for in if elif else endif endfor set endset macro endmacro call endcall filter endfilter
    x y messages loop ns namespace( ) ( [ ] { } , . : | = == != < + - * ** / // % ~ not and or is 'a' "b" 0 1 99 1e9
    range( tojson join map select list length upper string reverse batch sort .x .items() [0] [::-1] recursive break
    continue true none raise_exception( cycler( generation endgeneration {# #} defined string mapping""",
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join))
def test_any_words_are_text_or_refused(text: str) -> None:
    try:
        assert isinstance(render(text, USER), str)
    except (FormatError, UsageError) as error:
        assert "template" in error.message


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS[4:]), max_size=12).map(" ".join))
def test_any_expression_is_text_or_refused(text: str) -> None:
    try:
        ours: str | None = render("{{ " + text + " }}", USER)
    except (FormatError, UsageError):
        return
    if "range(" not in text and "namespace" not in text and "cycler" not in text and "loop" not in text:
        assert ours == by_transformers("{{ " + text + " }}", USER, add_generation_prompt=True)


def test_a_failure_names_its_line() -> None:
    with pytest.raises(FormatError, match=r"the chat template, line 3: .*1000|line 3: a format"):
        render("a\n\n{{ '%9999d' % 1 }}\n", USER)
    with pytest.raises(FormatError, match=r"the chat template, line 2: "):
        render("a\n{{ messages[0].content + 1 }}", USER)
    with pytest.raises(FormatError, match=r"the chat template, line 2: .*endif"):
        render("a\n{% if x %}", USER)


def test_the_template_refuses_the_messages() -> None:
    text = "{{ raise_exception('roles must ' ~ 'alternate') }}"
    with pytest.raises(UsageError, match="refuses these messages: roles must alternate"):
        render(text, USER)
    with pytest.raises(UsageError) as refused:
        render("{{ raise_exception('x' * 100000) }}", USER)
    assert len(refused.value.message) < 1200


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "no message"),
        ("hi", "messages is str"),
        ({"role": "user"}, "messages is dict"),
        (None, "messages is NoneType"),
        (["hi"], "message 0 is str"),
        ([*USER, {"content": "x"}], "message 1 has role None"),
        ([{"role": 3, "content": "x"}], "message 0 has role 3"),
        ([{"role": "", "content": "x"}], "message 0 has role ''"),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([{"role": "user", "content": {"a": 1}}], "content of type dict"),
        ([{"role": "user", "content": ["x"]}], "a part that is 'x'"),
        ([{"role": "user", "content": [{"text": "x"}]}], "a part that is"),
        ([{"role": "user", "content": "x", "more": object()}], "object, which is not JSON"),
        ([{"role": "user", "content": "x", "more": {1: 2}}], "key that is not a string"),
        ([{"role": "user", "content": "x", "more": b"y"}], "bytes, which is not JSON"),
    ],
)
def test_messages_that_are_none(messages: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named) as refused:
        render("{{ messages }}", messages)
    assert refused.value.hint or "key" in named


def test_deep_messages_and_bad_tools() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    with pytest.raises(UsageError, match="nested more than"):
        render("{{ messages }}", [{"role": "user", "content": "x", "more": deep}])
    with pytest.raises(UsageError, match="tools is dict"):
        render("x", USER, tools={"a": 1})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="tool 0 is function"):
        render("x", USER, tools=[test_the_date])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="a variable of the template"):
        render("x", USER, image=object())


def test_what_is_given_is_not_changed() -> None:
    messages = [{"role": "user", "content": "x", "name": None, "thinking": "y"}]
    before = json.dumps(messages)
    render("{{ messages[0].thinking }}", messages)
    assert json.dumps(messages) == before


# Where it comes from


def _write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        place = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return folder


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    _write(tmp_path, tokenizer_config_json='{"eos_token": "x"}')
    assert ChatTemplate.load(tmp_path) is None


def test_both_places_and_the_special_tokens(tmp_path: Path) -> None:
    config = {
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
    }
    _write(tmp_path, tokenizer_config_json=json.dumps(config))
    found = ChatTemplate.load(tmp_path)
    assert found is not None and found.render(USER) == "<s>hi"
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"} == special_tokens(config)
    assert found.render(USER, bos_token="!") == "!hi"
    _write(tmp_path, chat_template_jinja="file {{ eos_token }}")
    found = ChatTemplate.load(tmp_path)
    assert found is not None and found.render(USER) == "file </s>"


def test_several_by_name(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
    ]
    _write(tmp_path, tokenizer_config_json=json.dumps({"chat_template": named}))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert found.render(USER) == "plain" and found.render(USER, tools=TOOLS) == "tools 2"
    saved = tmp_path / "saved"
    found.save(saved)
    again = ChatTemplate.load(saved)
    assert again is not None and again.templates == found.templates
    with pytest.raises(UsageError, match="none is called 'default'"):
        ChatTemplate({"rag": "x"}).render(USER)
    with pytest.raises(FormatError, match="cannot be a file's name"):
        ChatTemplate({"../rag": "x"}).save(tmp_path)
    with pytest.raises(FormatError, match="no template"):
        ChatTemplate({})


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    """The template of the tokenizer that is saved is the one that AutoTokenizer applies."""
    from transformers import AutoTokenizer

    from moiety.model.tokenizer import Tokenizer, train_tokenizer

    tokenizer = train_tokenizer(["some text to learn from"] * 10, 300)
    tokenizer.chat_template = ChatTemplate(TEMPLATES["chatml"])
    tokenizer.special_tokens = {"bos_token": "<|endoftext|>"}
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHATS["turns"], tokenize=False, add_generation_prompt=True)
    again = Tokenizer.load(tmp_path)
    assert again.chat_template is not None and again.special_tokens["bos_token"] == "<|endoftext|>"
    assert again.chat_template.render(CHATS["turns"]) == expected
    assert again.encode_with_special(expected) == theirs.encode(expected, add_special_tokens=False)
    text = "a<|endoftext|>b<|endoftext|>"
    assert again.encode_with_special(text) == theirs.encode(text, add_special_tokens=False)
    assert again.encode_with_special(text).count(again.end_id) == 2
    assert again.end_id not in again.encode(text)
    assert again.encode_with_special("") == []


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer_config_json": '{"chat_template": 3}'}, "chat_template has 3"),
        ({"tokenizer_config_json": '{"chat_template": [3]}'}, "chat_template has 3"),
        ({"tokenizer_config_json": '{"chat_template": [{"name": "a"}]}'}, "chat_template has"),
        ({"tokenizer_config_json": "{"}, "not whole JSON"),
        ({"chat_template_jinja": "x" * 500_000}, "500,000 bytes"),
    ],
)
def test_files_that_are_none(files: dict[str, str], named: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=named):
        ChatTemplate.load(_write(tmp_path, **files))


def test_a_file_that_is_no_text_or_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not UTF-8"):
        ChatTemplate.load(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "chat_template.jinja").symlink_to(tmp_path / "chat_template.jinja")
    with pytest.raises((FormatError, StorageError), match=r"chat_template\.jinja"):
        ChatTemplate.load(elsewhere)


def test_errors_name_the_file(tmp_path: Path) -> None:
    _write(tmp_path, chat_template_jinja="{{ 1 + }}")
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    with pytest.raises(FormatError, match=r"chat_template\.jinja, line 1"):
        found.render(USER)

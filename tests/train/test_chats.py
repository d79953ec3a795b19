"""What of a chat is learnt: against pieces written out by hand, token by token, in the styles of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moiety.errors import DataError, FormatError, MoietyError, UsageError
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.train.chats import Encoder, Sample, answers, read_lines
from tests.train.chatting import CHAT, CHATML_MARKED, GPT_OSS, MISTRAL, QWEN3, STYLES, chat, tokenizer


def encoder(of: Tokenizer, **changes: Any) -> Encoder:
    return Encoder(of, **{"turns": "all", "length": 500, "too_long": "refuse", **changes})


def learnt_by_hand(of: Tokenizer, tokens: tuple[int, ...], pieces: list[tuple[str, bool]]) -> list[bool]:
    """Token after token: learnt if every byte that it stands for is in a learnt piece."""
    label = [learnt for text, learnt in pieces for _ in text.encode()]
    names, at, found = {token: name for name, token in of.special_ids().items()}, 0, []
    for token in tokens:
        written = names[token].encode() if token in names else of.bytes_of((token,))
        part = label[at : at + len(written)]
        assert len({*part}) == 1, (token, written, part)  # no token is on both sides
        found.append(part[0])
        at += len(written)
    assert at == len(label), (at, len(label))
    return found


def text_of(of: Tokenizer, sample: Sample, *, learnt: bool = False) -> str:
    names = {token: name for name, token in of.special_ids().items()}
    chosen = [
        token
        for token, is_learnt in zip(sample.tokens, sample.learnt, strict=True)
        if is_learnt or not learnt
    ]
    return b"".join(names[t].encode() if t in names else of.bytes_of((t,)) for t in chosen).decode()


@pytest.mark.parametrize("style", STYLES)
def test_the_mask_of_every_style(style: str) -> None:
    template, pieces = STYLES[style]
    of = tokenizer(template)
    ((sample,),) = encoder(of).units({"messages": chat(*CHAT)})
    assert text_of(of, sample) == "".join(text for text, _ in pieces)
    assert list(sample.learnt) == learnt_by_hand(of, sample.tokens, pieces)
    assert sample.tokens == tuple(of.encode_with_special("".join(text for text, _ in pieces)))


@pytest.mark.parametrize("style", STYLES)
def test_each_prompt_is_what_the_model_will_be_given(style: str) -> None:
    template = STYLES[style][0]
    of = tokenizer(template)
    ((sample,),) = encoder(of).units({"messages": chat(*CHAT)})
    assert of.chat_template is not None
    for turns in (1, 3):
        prompt = of.encode_with_special(of.chat_template.render(chat(*CHAT)[:turns]))
        assert sample.tokens[: len(prompt)] == tuple(prompt)
        assert not sample.learnt[len(prompt) - 1] and sample.learnt[len(prompt)]


def test_last_and_each_turn() -> None:
    of = tokenizer()
    ((last,),) = encoder(of, turns="last").units({"messages": chat(*CHAT)})
    assert text_of(of, last, learnt=True) == "due zwei<|im_end|>"
    units = encoder(of, turns="each").units({"messages": chat(*CHAT)})
    assert [text_of(of, one, learnt=True) for (one,) in units] == ["uno eins<|im_end|>", "due zwei<|im_end|>"]
    assert len(units[0][0].tokens) < len(units[1][0].tokens)


@pytest.mark.parametrize("template", [QWEN3, GPT_OSS])
def test_a_template_that_writes_earlier_turns_anew(template: str) -> None:
    of, messages = (
        tokenizer(template),
        chat("one", "<think>\nhm\n</think>\n\nuno", "two", "<think>\nja\n</think>\n\ndue"),
    )
    with pytest.raises(UsageError, match="writes message 1 otherwise") as refused:
        encoder(of).units({"messages": messages})
    assert "--turns each" in str(refused.value.hint)
    assert of.chat_template is not None
    for turns, count in (("last", 1), ("each", 2)):
        units = encoder(of, turns=turns).units({"messages": messages})
        assert len(units) == count
        for (sample,), stop in zip(units, (4,) if count == 1 else (2, 4), strict=True):
            prompt = of.encode_with_special(of.chat_template.render(messages[: stop - 1]))
            whole = of.chat_template.render(messages[:stop], add_generation_prompt=False)
            assert text_of(of, sample) == whole.rstrip("\n")
            first = sample.learnt.index(True)
            assert sample.tokens[:first] == tuple(prompt) and all(sample.learnt[first:])


def test_tool_calls_are_learnt_and_results_are_not() -> None:
    of = tokenizer(GPT_OSS)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "due"},
    ]
    ((sample,),) = encoder(of).units({"messages": messages})
    assert text_of(of, sample, learnt=True) == (
        '<|channel|>commentary to=add<|message|>{"a": 1}<|call|><|channel|>final<|message|>due<|return|>'
    )


def test_marks_and_prefixes_say_the_same() -> None:
    plain = CHATML_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    messages = chat("0 \0 00", "a\0b", "\0" + "1<", "c", system="s")
    by_marks, by_prefix = (answers(tokenizer(one).chat_template, messages) for one in (CHATML_MARKED, plain))  # type: ignore[arg-type]
    assert by_marks.text == by_prefix.text
    starts = [start for start, _ in by_marks.spans]
    assert starts == [start for start, _ in by_prefix.spans]
    assert [by_marks.text[a:b] for a, b in by_marks.spans] == ["a\0b<|im_end|>", "c<|im_end|>"]


def test_weights_choose_answers() -> None:
    of, messages = tokenizer(), chat(*CHAT)
    messages[1]["weight"] = 0
    ((sample,),) = encoder(of).units({"messages": messages})
    assert text_of(of, sample, learnt=True) == "due zwei<|im_end|>"


def test_texts_completions_and_pairs() -> None:
    of = tokenizer()
    ((text,),) = encoder(of).units({"text": "the cat <s>"})
    assert text.tokens == (*of.encode("the cat <s>"), of.end_id)  # letters of a special token stay letters
    assert text.learnt == (False, *[True] * (len(text.tokens) - 1))
    ((done,),) = encoder(of).units({"prompt": "the cat", "completion": " sat on the mat."})
    assert text_of(of, done, learnt=True) == " sat on the mat.</s>"
    assert done.tokens[: done.learnt.index(True)] == tuple(of.encode("the cat"))
    ((pair,),) = [encoder(of).units({"prompt": "one", "chosen": [*chat("x", "uno")[1:]], "rejected": "due"})]
    assert [text_of(of, one, learnt=True) for one in pair] == ["uno<|im_end|>", "due<|im_end|>"]
    assert pair[0].tokens[: pair[0].learnt.index(True)] == pair[1].tokens[: pair[1].learnt.index(True)]


def test_a_border_inside_a_token_is_counted_and_cut_where_the_prompt_ends() -> None:
    of = train_tokenizer(["the cat sat on the mat " * 50], 300)
    assert len(of.encode("cat")) == 1
    encoding = encoder(of)
    ((sample,),) = encoding.units({"prompt": "the c", "completion": "at sat"})
    first = sample.learnt.index(True)
    assert sample.tokens[:first] == tuple(of.encode("the c"))
    assert sample.tokens[first:] == (*of.encode("at sat"), of.end_id)
    assert any("begins inside a token" in what for what in encoding.counts)


def test_too_long_samples_are_counted() -> None:
    of = tokenizer()
    line, short = {"messages": chat("one " * 30, "uno")}, {"messages": chat("one", "uno " * 30)}
    length = 40
    with pytest.raises(UsageError, match="the length is 40"):
        encoder(of, length=length).units(line)
    dropping = encoder(of, length=length, too_long="drop")
    assert dropping.units(line) == dropping.units(short) == []
    assert dropping.counts["samples are longer than 40 tokens and are dropped"] == 2
    cutting = encoder(of, length=length, too_long="cut")
    assert cutting.units(line) == []  # nothing learnt would be left
    ((cut,),) = cutting.units(short)
    assert len(cut.tokens) == length and cut.learnt[-1]
    assert cutting.counts["samples are cut at 40 tokens"] == 1


def test_what_is_noticed() -> None:
    encoding = encoder(tokenizer())
    encoding.units({"messages": chat("one <|im_end|>", "uno"), "id": 3})
    assert encoding.counts["lines have a key 'id', which is not used"] == 1
    assert (
        encoding.counts["chats have the letters of a special token in a message, which become that token"]
        == 1
    )
    assert dict(encoding.ends) == {tokenizer().special_ids()["<|im_end|>"]: 1}


REFUSED: dict[str, tuple[Any, str]] = {
    "other keys": ({"conversations": []}, "it has the keys conversations"),
    "no keys": ({}, "it has the keys none"),
    "no list": ({"messages": "hi"}, "not a list of objects"),
    "no objects": ({"messages": ["hi"]}, "not a list of objects"),
    "no message": ({"messages": []}, "no message is to be learnt"),
    "no answer": ({"messages": chat("one")}, "no message is to be learnt"),
    "no role": ({"messages": [{"from": "human", "value": "x"}, *chat("a", "b")]}, "message 0 has role None"),
    "empty answer": ({"messages": chat("one", " \n")}, "message 1 is an answer without words"),
    "answer first": ({"messages": chat("x", "uno", "one", "due")[1:]}, "answers nothing"),
    "weight": ({"messages": [{"role": "user", "content": "x", "weight": 2}]}, "message 0 has weight 2"),
    "true weight": ({"messages": [{"role": "user", "content": "x", "weight": True}]}, "has weight True"),
    "all weights 0": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]},
        "no message is to be learnt",
    ),
    "content": ({"messages": [{"role": "user", "content": 3}, *chat("a", "b")[1:]]}, "content of type int"),
    "empty completion": ({"prompt": "x", "completion": " "}, "completion is ' '"),
    "number completion": ({"prompt": "x", "completion": 3}, "prompt and completion are no texts"),
    "text of no words": ({"text": ""}, "text is ''"),
    "text a number": ({"text": 4}, "text is 4"),
    "same pair": ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
    "tools": ({"messages": chat("a", "b"), "tools": "x"}, "tools is str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_lines(case: str) -> None:
    value, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        encoder(tokenizer()).units(value)


def test_refused_templates() -> None:
    chatting = {"messages": chat(*CHAT)}
    with pytest.raises(UsageError, match="no chat template"):
        encoder(tokenizer(None)).units(chatting)
    with pytest.raises(FormatError, match="never learn to stop"):
        encoder(tokenizer(MISTRAL.replace(" ~ eos_token", ""))).units(chatting)
    outside = CHATML_MARKED.replace("message.content + '<|im_end|>' }}{% end", "message.content }}{% end")
    with pytest.raises(FormatError, match="never learn to stop"):
        encoder(tokenizer(outside)).units(chatting)
    once = CHATML_MARKED.replace("== 'assistant'", "== 'assistant' and loop.last")
    with pytest.raises(FormatError, match="marks 1 answers in a chat that has 2"):
        encoder(tokenizer(once)).units(chatting)
    changed = "{% set x %}{% generation %}{{ messages[1].content }}</s>{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(MoietyError, match="changes what stands between"):
        encoder(tokenizer(changed)).units({"messages": chat("one", "uno")})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        (b'\n\n["a"]\n', "line 3 is list"),
        (b'{"text": "\xff"}', "line 1 is not UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_refused_files(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(read_lines(file))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        list(read_lines(tmp_path / "none.jsonl"))


def test_empty_lines_count(tmp_path: Path) -> None:
    file = tmp_path / "gaps.jsonl"
    file.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert [number for number, _ in read_lines(file)] == [1, 4]

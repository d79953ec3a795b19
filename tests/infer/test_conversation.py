"""Conversations: what the model is shown, where an answer ends, and what is forgotten when there is no room."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from moiety.errors import FormatError, UsageError
from moiety.infer.conversation import Conversation
from moiety.infer.open import Opened, open_model
from moiety.infer.options import SamplingOptions
from moiety.model import checkpoint
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import train_tokenizer
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def opened(
    folder: Path, template: str | None = TEMPLATE, positions: int = 120, ends: object = None
) -> Opened:
    tokenizer = train_tokenizer(["one two three [u] [a] [s]"] * 9, 280)
    if template is not None:
        tokenizer.chat_template = ChatTemplate(template)
    model = tiny.model(
        "", moe=tiny.experts(d_ff=14), d_ff=14, vocab_size=tokenizer.vocab_size, max_positions=positions
    )
    checkpoint.save(model, folder, tokenizer=tokenizer)
    (folder / "manifest.json").unlink()
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return open_model(folder)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the model was given, call by call; it answers `two`, an end token, and more that nobody may see."""
    calls: list[list[int]] = []

    def stream(engine: Any, ids: Sequence[int], options: Any) -> Iterator[int]:
        calls.append(list(ids))
        return iter(ANSWER)

    monkeypatch.setattr("moiety.infer.conversation.Engine.stream", stream)
    return calls


ANSWER: list[int] = []


def test_turns_go_through_the_template(tmp_path: Path, shown: list[list[int]]) -> None:
    found = opened(tmp_path / "m")
    tokenizer = found.tokenizer
    ANSWER[:] = [*tokenizer.encode("two"), tokenizer.end_id, *tokenizer.encode("unseen")]
    talk = Conversation(found, system="be brief", max_tokens=8)
    assert talk.has_format
    assert "".join(talk.answer("one")) == "two"
    assert "".join(talk.answer("three")) == "two"
    end = tokenizer.end_token
    first = f"[s]be brief{end}[u]one{end}[a]"
    assert shown[0] == tokenizer.encode_with_special(first)
    assert shown[0].count(tokenizer.end_id) == 2
    assert shown[1] == tokenizer.encode_with_special(f"{first}two{end}[u]three{end}[a]")


def test_the_oldest_turns_are_forgotten(tmp_path: Path, shown: list[list[int]]) -> None:
    found = opened(tmp_path / "m", positions=40)
    ANSWER[:] = found.tokenizer.encode("two")
    talk = Conversation(found, system="s", max_tokens=10)
    for line in ("one", "two", "three", "one two", "three"):
        assert "".join(talk.answer(line)) == "two"
    assert max(map(len, shown)) <= 30 and len(shown[-1]) > 10
    text = found.tokenizer.decode(shown[-1])
    assert text.startswith("[s]s") and text.endswith("[u]three[a]") and "[u]one[a]" not in text
    with pytest.raises(UsageError, match="has room for 30") as refused:
        list(talk.answer("one two three " * 20))
    assert refused.value.hint


def test_other_end_tokens(tmp_path: Path, shown: list[list[int]]) -> None:
    found = opened(tmp_path / "m", ends=[7, 260])
    assert found.ends == {7, 260, found.tokenizer.end_id}
    ANSWER[:] = [*found.tokenizer.encode("two"), 260, 8]
    assert "".join(Conversation(found).answer("one")) == "two"
    assert opened(tmp_path / "one", ends=9).ends == {9, found.tokenizer.end_id}
    with pytest.raises(FormatError, match="eos_token_id"):
        opened(tmp_path / "bad", ends=["x"])


def test_without_a_template_a_line_is_continued(tmp_path: Path, shown: list[list[int]]) -> None:
    found = opened(tmp_path / "m", template=None)
    tokenizer = found.tokenizer
    ANSWER[:] = tokenizer.encode("\n two\nunseen")
    talk = Conversation(found)
    assert not talk.has_format
    assert "".join(talk.answer("one")).strip() == "two"
    list(talk.answer("three"))
    assert tokenizer.decode(shown[0]) == "one\n"
    assert tokenizer.decode(shown[1]).startswith("one\n") and tokenizer.decode(shown[1]).endswith(
        "two\nthree\n"
    )
    with pytest.raises(UsageError, match="no chat template"):
        Conversation(found, system="x")


def test_a_real_model_answers(tmp_path: Path) -> None:
    found = opened(tmp_path / "m")
    greedy = SamplingOptions(temperature=0)
    texts = ["".join(Conversation(found, max_tokens=6, sampling=greedy).answer("one")) for _ in range(2)]
    assert texts[0] == texts[1]
    plain, talk = (Conversation(found, max_tokens=6, sampling=greedy, plain=flag) for flag in (True, False))
    for line in ("one", "two", "three"):
        assert "".join(talk.answer(line)) == "".join(plain.answer(line))


def test_a_template_that_fails(tmp_path: Path) -> None:
    for template, kind in (("{{ 1 + 'x' }}", FormatError), ("{{ raise_exception('no') }}", UsageError)):
        talk = Conversation(opened(tmp_path / kind.__name__, template))
        with pytest.raises(kind):
            list(talk.answer("one"))

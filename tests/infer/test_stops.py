"""Stop texts: cut at the same place however the text was divided, and never shown too early."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from moiety.infer.stops import AnswerText, StopTexts


def definition(text: str, stops: Iterable[str]) -> tuple[str, bool]:
    """What is left of a whole text, character by character."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_any_division_is_cut_like_the_whole(pieces: list[str], stops: list[str]) -> None:
    whole, is_cut = definition("".join(pieces), stops)
    found, shown = StopTexts(stops), ""
    for number, piece in enumerate(pieces):
        shown += found.push(piece)
        assert whole.startswith(shown), "what was shown stays"
        so_far = "".join(pieces[: number + 1])
        if not found.found and not any(
            so_far.endswith(stop[:1]) or stop[:1] in so_far[-3:] for stop in stops
        ):
            assert shown == so_far, "nothing is held back without need"
    assert found.found == is_cut
    assert shown + found.finish() == whole


class Letters:
    """Token 1 is "a"; token 9 writes half of a character that token 10 completes."""

    def push(self, token: int) -> str:
        return "" if token == 9 else "ü" if token == 10 else chr(96 + token)

    def finish(self) -> str:
        return "\N{REPLACEMENT CHARACTER}"


def test_tokens_borders_do_not_matter() -> None:
    text = AnswerText(Letters(), ["cd"])
    assert [text.push(token) for token in (1, 3, 3)] == ["a", "", "c"] and not text.stopped
    assert text.push(4) == "" and text.stopped and text.finish() == ""
    whole = AnswerText(Letters(), ["cd"])
    assert [whole.push(token) for token in (9, 10, 3)] == ["", "ü", ""]
    assert whole.finish() == "c\N{REPLACEMENT CHARACTER}"


def test_nothing_is_looked_for_too_early() -> None:
    text = AnswerText(Letters(), ["ab"])
    assert "".join(text.push(token, may_stop=False) for token in (1, 2, 1)) == "aba" and not text.stopped
    assert text.push(2) == "b", "a stop text must be there whole"
    assert text.push(1) + text.push(2) == "" and text.stopped

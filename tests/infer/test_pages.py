"""Pages: what is shared, what is found again, what goes first."""

from __future__ import annotations

import pytest

from moiety.infer.pages import Pages, Table


def filled(pages: Pages, tokens: list[int], salt: str = "") -> Table:
    """A table whose tokens are all computed."""
    table = Table(salt)
    pages.reuse(table, tokens)
    assert pages.extend(table, len(tokens))
    pages.publish(table, tokens, len(tokens))
    return table


def found(pages: Pages, tokens: list[int], salt: str = "") -> int:
    table = Table(salt)
    count = pages.reuse(table, tokens)
    pages.release(table)
    return count


def test_only_full_pages_and_never_the_last_token() -> None:
    pages = Pages(10, 4)
    table = filled(pages, [*range(10)])
    pages.check([table])
    assert pages.kept == 2 and pages.available == 7
    assert found(pages, [*range(10)]) == 8 and found(pages, [*range(9)]) == 8
    assert found(pages, [*range(8)]) == 4, "one token is left to compute"
    assert found(pages, [0, 1, 2]) == 0 and found(pages, [0, 1, 2, 9, 4, 5]) == 0
    assert found(pages, [4, 5, 6, 7, 8]) == 0, "the same tokens after others are another page"
    assert found(pages, [*range(10)], "salt") == 0


def test_shared_pages_are_held_until_the_last_gives_them_back() -> None:
    pages = Pages(6, 2)
    first, second = filled(pages, [1, 2, 3, 4, 5]), filled(pages, [1, 2, 3, 4, 6])
    assert first.pages[:2] == second.pages[:2] and first.pages[2] != second.pages[2]
    pages.check([first, second])
    pages.release(first)
    assert pages.available == 3
    pages.check([second])
    pages.release(second)
    assert pages.available == 6 and pages.kept == 2
    pages.check([])


def test_the_same_work_done_twice_is_kept_once() -> None:
    pages, tokens = Pages(8, 2), [1, 2, 3, 4]
    one, two = Table(), Table()
    assert pages.extend(one, 4) and pages.extend(two, 4)
    pages.publish(one, tokens, 3)
    pages.publish(two, tokens, 4)
    assert two.pages[0] == one.pages[0] and two.pages[1] != one.pages[1]
    pages.publish(one, tokens, 4)
    assert one.pages == two.pages and pages.available == 6
    pages.check([one, two])


def test_the_longest_unused_goes_first_and_never_before_what_follows_it() -> None:
    pages = Pages(4, 2)
    pages.release(filled(pages, [1, 2, 3, 4]))
    pages.release(filled(pages, [5, 6, 7, 8]))
    assert pages.available == 4 and pages.kept == 4
    assert found(pages, [1, 2, 9]) == 2  # used again, so it stays
    table = Table()
    assert pages.extend(table, 2)
    assert found(pages, [1, 2, 3, 4, 9]) == 2, "the end of the oldest went"
    assert found(pages, [5, 6, 7, 8, 9]) == 4
    pages.check([table])
    assert pages.extend(table, 8) and pages.kept == 0
    pages.check([table])


def test_too_few_pages_change_nothing() -> None:
    pages = Pages(3, 2)
    table, other = Table(), filled(pages, [1, 2])
    assert not pages.extend(table, 5) and table.pages == [] and pages.available == 2
    assert pages.extend(table, 4) and not pages.extend(table, 5) and len(table.pages) == 2
    pages.check([table, other])


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    pages = Pages(4, 2, prefix_cache=False)
    pages.release(filled(pages, [1, 2, 3, 4]))
    assert pages.kept == 0 and found(pages, [1, 2, 3, 4, 5]) == 0


def test_tokens_are_compared_not_their_hashes() -> None:
    pages = Pages(8, 2)
    pages.release(filled(pages, [-1, 5]))  # hash(-1) == hash(-2)
    assert hash((-1, 5)) == hash((-2, 5))
    assert found(pages, [-2, 5, 0]) == 0 and found(pages, [-1, 5, 0]) == 2


@pytest.mark.parametrize("place", ["_references", "_free", "_key", "_found"])
def test_the_check_sees_damage(place: str) -> None:
    pages = Pages(4, 2)
    table = filled(pages, [1, 2, 3])
    pages.check([table])
    damaged = getattr(pages, place)
    if place == "_references":
        damaged[table.pages[0]] += 1
    else:
        damaged.pop(next(iter(damaged)) if isinstance(damaged, dict) else 0)
    with pytest.raises(AssertionError):
        pages.check([table])

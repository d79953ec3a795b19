"""Who sits in which slot: rules that hold for every policy and any calls, and plain definitions of the policies."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.errors import ConfigError
from moiety.residency import POLICIES, Residency, belady, cliff, settle

LAYERS, EXPERTS = 4, 9
Calls = list[tuple[int, list[int]]]
calls_of = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1), st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=5, unique=True)
    ),
    max_size=60,
)


def cyclic(tokens: int, experts: int, k: int, seed: int, skew: float = 0.0) -> Calls:
    """Tokens that go through all layers, and choose k of the experts there."""
    source = random.Random(seed)
    weights = [(number + 1) ** -skew for number in range(experts)]
    order = [source.sample(range(experts), experts) for _ in range(LAYERS)]
    calls = []
    for _ in range(tokens):
        for layer in range(LAYERS):
            keys = [source.random() ** (1 / weight) for weight in weights]
            best = sorted(range(experts), key=lambda one: -keys[one])[:k]
            calls.append((layer, sorted(order[layer][one] for one in best)))
    return calls


def run(calls: Calls, slots: int, policy: str) -> Residency:
    residency = Residency(slots, policy, layers=LAYERS)
    for layer, experts in calls:
        residency.use(layer, experts)
    return residency


def rate(residency: Residency) -> float:
    return residency.hits / (residency.hits + residency.misses)


def naive_lru(calls: Calls, slots: int) -> int:
    """Hits, where after a call those used last stay; of one call's the higher number."""
    used: dict[tuple[int, int], int] = {}
    hits = 0
    for now, (layer, experts) in enumerate(calls):
        keys = [(layer, expert) for expert in experts]
        hits += sum(key in used for key in keys)
        used |= dict.fromkeys(keys, now)
        stay = sorted(used, key=lambda key: (used[key], key))[-slots:]
        used = {key: used[key] for key in stay}
    return hits


def naive_belady(calls: Calls, slots: int) -> int:
    """The most hits over all ways to choose who stays, by trying each; for a few calls only."""
    best = {frozenset[tuple[int, int]](): 0}
    for layer, experts in calls:
        keys = frozenset((layer, expert) for expert in experts)
        after: dict[frozenset[tuple[int, int]], int] = {}
        for here, hits in best.items():
            found = hits + len(here & keys)
            for some in _subsets(sorted(here | keys), slots):
                after[some] = max(after.get(some, 0), found)
        best = after
    return max(best.values())


def _subsets(keys: Sequence[tuple[int, int]], most: int) -> list[frozenset[tuple[int, int]]]:
    whole = [
        frozenset(key for bit, key in enumerate(keys) if mask >> bit & 1) for mask in range(2 ** len(keys))
    ]
    return [some for some in whole if len(some) == min(most, len(keys))]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(calls=calls_of, slots=st.integers(6, 30), spare=st.integers(0, 2), seed=st.integers(0, 9))
def test_whatever_is_asked_slots_have_one_owner_and_everything_is_counted(
    policy: str, calls: Calls, slots: int, spare: int, seed: int
) -> None:
    residency, source = Residency(slots, policy, layers=LAYERS, spare=spare), random.Random(seed)
    content: dict[int, tuple[int, int]] = {}  # what a store would have in its slots
    wanted = 0
    for layer, experts in calls:
        if source.random() < 0.5:
            key = source.randrange(LAYERS), source.randrange(EXPERTS)
            slot = residency.guess(key)
            if slot is not None:
                content[slot] = key
                residency.release([key])
        early = source.randrange(1, LAYERS), source.randrange(EXPERTS)
        if source.random() < 0.5 and early not in residency:
            load = residency.ahead(early)
            if load is not None:
                assert load.gone is None or content[load.slot] == load.gone
                content[load.slot] = early
                residency.release([early])
        use = residency.use(layer, experts)
        assert use.hits.keys() | {load.key[1] for load in use.loads} == set(experts)
        assert all(content[slot] == (layer, expert) for expert, slot in use.hits.items())
        for load in use.loads:
            assert load.gone is None or content[load.slot] == load.gone
            content[load.slot] = load.key
        if policy != "fixed" and len(experts) <= (slots - spare) // LAYERS:  # all are there when it ends
            assert all((layer, expert) in residency for expert in experts)
        residency.check()
        wanted += len(experts)
    assert residency.hits + residency.misses == wanted
    assert residency.right <= residency.guesses


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(calls=calls_of, slots=st.integers(4, 30))
def test_nobody_beats_who_knows_the_future(policy: str, calls: Calls, slots: int) -> None:
    hits, misses = belady(calls, slots)
    residency = run(calls, slots, policy)
    assert hits + misses == residency.hits + residency.misses
    assert residency.hits <= hits


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)),
        max_size=9,
    ),
    slots=st.integers(1, 4),
)
def test_belady_is_the_best_of_all_ways(calls: Calls, slots: int) -> None:
    assert belady(calls, slots)[0] == naive_belady(calls, slots)


@settings(max_examples=100, deadline=None)
@given(calls=calls_of, slots=st.integers(5, 36))
def test_lru_is_its_definition(calls: Calls, slots: int) -> None:
    assert run(calls, slots, "lru").hits == naive_lru(calls, slots)


def test_recency_finds_nothing_below_one_tokens_cycle_and_the_others_do() -> None:
    k, slots = 3, LAYERS * 3 - 3
    calls = cyclic(200, EXPERTS, k, seed=1)
    assert cliff(slots, [k] * LAYERS) and not cliff(slots + 3, [k] * LAYERS)
    assert run(calls, slots, "lru").hits == 0
    share = slots / (LAYERS * EXPERTS)
    for policy in ("lfru", "layered", "fixed"):
        assert rate(run(calls, slots, policy)) > 0.6 * share, policy  # one call of k takes some slots


def test_frequency_finds_what_is_used_most() -> None:
    calls = cyclic(400, 32, 4, seed=2, skew=1.0)
    found = {policy: rate(run(calls, 40, policy)) for policy in POLICIES}
    assert min(found["lfu"], found["lfru"], found["layered"]) > found["lru"] + 0.05 > found["fixed"] - 0.1, (
        found
    )


def test_a_prompt_leaves_what_decoding_keeps() -> None:
    decoding: Calls = [(layer, [layer, layer + 1]) for _ in range(20) for layer in range(LAYERS)]
    prompt: Calls = [(layer, list(range(EXPERTS))) for _ in range(3) for layer in range(LAYERS)]
    residency = Residency(2 * LAYERS + 2, "lfru", layers=LAYERS)
    for layer, experts in decoding:
        residency.use(layer, experts)
    misses = residency.misses
    for layer, experts in prompt:
        for expert in residency.begin(layer, experts)[1]:  # as a store does: a few at a time
            load = residency.take((layer, expert))
            assert load is not None
            residency.release([load.key])
        residency.release([(layer, expert) for expert in experts])
    # of the two slots that decoding left free one keeps an expert of the first prompt, which the others find
    assert residency.misses - misses == 3 * LAYERS * (EXPERTS - 2) - 2
    assert all((layer, expert) in residency for layer, experts in decoding for expert in experts)


def sweep(residency: Residency, layer: int, early: Sequence[int] = ()) -> list[int]:
    """A prompt's call as a store makes it, then some of the next layer; those that were missed."""
    hits, missing = residency.begin(layer, range(EXPERTS))
    residency.release([(layer, expert) for expert in hits])
    flying: list[tuple[int, int]] = []
    for expert in missing:
        load = residency.take((layer, expert))
        if load is None:
            residency.release([flying.pop(0)])
            load = residency.take((layer, expert))
        assert load is not None
        flying.append(load.key)
    residency.release(flying)
    for expert in early:
        assert residency.ahead((layer + 1, expert)) is not None
    residency.check()
    return missing


def test_what_a_prompt_does_not_keep_passes_through_the_slots_of_its_first_layer() -> None:
    residency = Residency(4 * LAYERS, "layered", layers=LAYERS)
    for _ in range(2):
        for layer in range(LAYERS):
            residency.use(layer, [0, 1, 2, 3])
    for layer in range(LAYERS):
        assert sweep(residency, layer) == [4, 5, 6, 7, 8]
    kept = {layer: [one for one in residency.resident(layer) if one < 4] for layer in range(LAYERS)}
    assert kept == {0: [3]} | {layer: [0, 1, 2, 3] for layer in range(1, LAYERS)}
    hits, missing = residency.begin(0, [3, 4])
    assert [*hits] == [3] and missing == [4], "the slots are home"
    assert residency.resident(LAYERS - 1) == [0, 1, 2, 3]
    residency.release([(0, 3)])
    sweep(residency, 1)
    assert [*residency.begin(1, [3, 8])[0]] == [3, 8] and (1, 8) in residency, (
        "what is in use goes home later"
    )
    residency.release([(1, 3), (1, 8)])
    residency.begin(1, [0])
    assert (1, 8) not in residency
    residency.check()


def test_what_is_loaded_before_its_turn_is_missed_when_it_is_wanted() -> None:
    residency = Residency(4 * LAYERS, "layered", layers=LAYERS)
    for layer in range(LAYERS):
        residency.use(layer, [0, 1, 2, 3])
    sweep(residency, 0, early=[4, 5])
    misses, hits = residency.misses, residency.hits
    assert (1, 4) in residency and sweep(residency, 1) == [6, 7, 8]
    assert (residency.misses - misses, residency.hits - hits) == (5, 4)
    assert residency.resident(1)[:4] == [0, 1, 2, 3]
    assert residency.ahead((3, 8)) is not None, "what was served makes room"
    residency.release([(3, 8)])
    residency.use(2, [0])  # no sweep: what passed goes home
    assert (3, 8) not in residency and residency.ahead((3, 8)) is None, "only a sweep looks ahead"


def test_what_is_in_use_is_never_sent_away() -> None:
    residency = Residency(3, "lru", layers=1)
    hits, missing = residency.begin(0, [0, 1, 2, 3])
    loads = [residency.take((0, expert)) for expert in missing]
    assert not hits and loads[3] is None and all(loads[:3])
    residency.release([(0, 1)])
    last = residency.take((0, 3))
    assert last is not None and last.gone == (0, 1)


def test_guesses_use_spare_slots_alone_and_pass() -> None:
    residency = Residency(6, "lru", layers=2, spare=2)
    residency.use(0, [0, 1, 2, 3])
    assert residency.guess((1, 5)) is not None and residency.guess((1, 6)) is not None
    residency.release([(1, 5), (1, 6)])
    assert residency.guess((1, 7)) is None, "both spare slots are taken, and their call has not come"
    assert residency.guess((0, 1)) is None, "it is there"
    hits, missing = residency.begin(1, [5, 8])
    assert [*hits] == [5] and missing == [8] and residency.right == 1
    assert (0, 0) not in residency, "the guess that was right has the place that a miss would have got"
    assert residency.take((1, 8)) is not None
    residency.release([(1, 5), (1, 8)])
    assert residency.guess((0, 9)) is not None and residency.guess((0, 8)) is not None, "(1, 6) has passed"
    assert (1, 6) not in residency
    residency.check()


def test_a_load_that_failed_leaves_a_free_slot() -> None:
    residency = Residency(2, "lru", layers=1)
    residency.use(0, [0, 1])
    residency.begin(0, [2])
    load = residency.take((0, 2))
    assert load is not None
    residency.drop(load.key)
    residency.check()
    assert (0, 2) not in residency and (0, 1) in residency
    residency.begin(0, [3])
    again = residency.take((0, 3))
    assert again is not None and (again.slot, again.gone) == (load.slot, None)


def test_fixed_may_be_told_what_stays() -> None:
    keep = frozenset({(0, 4), (1, 4)})
    residency = Residency(3, "fixed", layers=2, keep=keep)
    for _ in range(3):
        for layer in range(2):
            for expert in range(EXPERTS):
                residency.use(layer, [expert])
    assert all(key in residency for key in keep)
    assert residency.hits == 2 * 2


def test_settling() -> None:
    chosen = [2] * 8
    assert settle(15, chosen, "lru").policy == "lfru"
    assert "16" in settle(15, chosen, "lru").said
    assert settle(16, chosen, "lru") == ("lru", "")
    assert settle(15, chosen, "layered").policy == "lfru" and settle(16, chosen, "layered").said == ""
    assert settle(15, chosen).policy == "lfru" and settle(32, chosen).policy == "layered"
    with pytest.raises(ConfigError, match="uses 2 experts"):
        settle(1, chosen)
    with pytest.raises(ConfigError, match="no policy 'mru'"):
        settle(16, chosen, "mru")
    with pytest.raises(ConfigError, match="at least 6"):
        Residency(5, "layered", layers=4, spare=2)
    with pytest.raises(ConfigError, match="no policy"):
        Residency(5, "mru", layers=4)

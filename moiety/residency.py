"""Which experts are in memory when not all of them fit: who sits in which slot, who goes, and by what rule.

Keys are (layer, expert), layers counted from 0 without gaps. No bytes are moved here: a store of experts asks before it
loads, and a replay of recorded routing asks in the same way, so that a plan counts what a run would do.

The layers of a model are visited one after the other, so recency alone fails at once: with fewer slots than one token
goes through, the least recently used expert is always the one wanted next, and nothing is ever found (`cliff`).
A policy is therefore *guarded*: where a call's experts, times the layers, are more than there are slots, an expert
that was missed is kept only if it was used more than what is there, before this call. That is how a prompt, which uses
nearly every expert once, leaves alone what decoding keeps. All others pass through a few slots, which go from layer to
layer, and home when the next token comes: there is one to read into while all that a layer keeps is in use, and before
the layer's turn (`Residency.ahead`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, final

from moiety.config import require

__all__ = ["POLICIES", "Key", "Load", "Policy", "Residency", "Settled", "Use", "belady", "cliff", "settle"]

Key = tuple[int, int]
NEVER = -math.inf
HALF_LIFE = 32.0  # tokens
AHEAD_BYTES = 16 << 20  # on their way at a time where a call goes through more experts than it may keep


class Load(NamedTuple):
    """An expert to be put into a slot, and who was there."""

    key: Key
    slot: int
    gone: Key | None


class Use(NamedTuple):
    """A call: which experts are there, in which slot, and which have to be loaded."""

    hits: dict[int, int]
    loads: list[Load]


def _recency(score: float, now: float) -> float:
    """When it was used last."""
    return now


def _frequency(score: float, now: float) -> float:
    """How often it was used; of equals the one that was used last."""
    return (0 if score == NEVER else math.floor(score)) + 1 + now / 2**40


def _decayed(score: float, now: float) -> float:
    """log2 of the uses, each counted half after `HALF_LIFE` tokens; one growing number instead of many falling ones."""
    new = now / HALF_LIFE
    low, high = (score, new) if score < new else (new, score)
    return high + math.log2(1 + 2.0 ** (low - high))


class Policy(NamedTuple):
    """Who goes: the expert of the lowest score.

    Args:
        score: The new score of what is used, from the old one and the time in tokens; it never falls.
        divided: Every layer has a share of the slots of its own.
        guarded: Calls that would sweep through all slots keep only what was used more.
        stays: What comes first stays for ever, in all slots but `Residency.rest`.
    """

    score: Callable[[float, float], float]
    divided: bool = False
    guarded: bool = False
    stays: bool = False


POLICIES = {
    "lru": Policy(_recency),
    "lfu": Policy(_frequency),
    "lfru": Policy(_decayed, guarded=True),
    "layered": Policy(_decayed, divided=True, guarded=True),
    "fixed": Policy(_recency, stays=True),
}


class _Pool:
    """Slots that are shared by some keys: the free ones, and the keys in the others by score when last looked at."""

    def __init__(self, slots: Iterable[int]) -> None:
        self.free = sorted(slots, reverse=True)
        self.size = len(self.free)
        self.heap: list[tuple[float, Key]] = []


@final
class Residency:
    """Who is in which slot.

    A call is `begin` (which of its experts are there), then for each that is not `take` (a slot for it), and `release`
    for each expert that was multiplied with; until then it is never sent away. `use` is all three.

    Args:
        slots: How many there are.
        policy: A name in `POLICIES`.
        layers: Layers with experts.
        rest: Slots of "fixed" that are not for ever.
        spare: Slots kept for guesses (`guess`).
        keep: Of "fixed": the experts that may stay; None lets those that come first.
        slot_bytes: Of a slot, if known; the smaller, the more have to be on their way at a time.

    Attributes:
        hits: Experts that were there when they were wanted; guesses count as such.
        misses: Experts that were not.
        guesses: Experts that were loaded on a guess.
        right: Of these, the ones that were wanted next.
        passing: Slots for what sweeps do not keep: those on their way and one that is in use.
        sweeps: The call goes through so many experts that what it misses is kept by former use alone.

    Raises:
        ConfigError: no such policy, or too few slots.
    """

    def __init__(
        self,
        slots: int,
        policy: str = "lfru",
        *,
        layers: int,
        rest: int = 1,
        spare: int = 0,
        keep: frozenset[Key] | None = None,
        slot_bytes: float = math.inf,
    ) -> None:
        require(policy in POLICIES, f"there is no policy {policy!r}", f"there are {', '.join(POLICIES)}")
        self.policy, self.layers = POLICIES[policy], layers
        shares = layers if self.policy.divided else 1
        least = spare + max(shares, rest if self.policy.stays else 1)
        require(
            slots >= least and spare >= 0 < rest,
            f"{slots} slots are too few for {policy!r} with {layers} layers, {rest} for the rest and {spare} spare",
            f"it needs at least {least}",
        )
        self.slots, self.passing = slots, 1 + min(max(2, math.ceil(AHEAD_BYTES / slot_bytes)), slots // 5)
        self._keep, self._staying = keep, slots - spare - rest if self.policy.stays else 0
        self._pools = [_Pool(range(spare + share, slots, shares)) for share in range(shares)]
        self._slot: dict[Key, int] = {}
        self._score: dict[Key, float] = {}
        self._rank: dict[Key, float] = {}
        self._pinned: set[Key] = set()
        self._spare = list(range(spare))
        self._guessed: dict[Key, int] = {}
        self._lent: dict[Key, _Pool] = {}  # what passes, and whose slot it has
        self._ahead: set[Key] = set()
        self._now, self.sweeps = 0, False
        self.hits = self.misses = self.guesses = self.right = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def slot_of(self, key: Key) -> int | None:
        """Where an expert is."""
        return self._slot.get(key)

    def resident(self, layer: int) -> list[int]:
        """Experts of a layer that are there."""
        return [expert for of, expert in self._slot if of == layer]

    def use(self, layer: int, experts: Sequence[int]) -> Use:
        """A whole call; where the slots are too few for it, those that were served first make room."""
        hits, missing = self.begin(layer, experts)
        served = [(layer, expert) for expert in hits]
        loads: list[Load] = []
        for expert in missing:
            load = self.take((layer, expert))
            if load is None:
                self.release(served)
                served.clear()
                load = self.take((layer, expert))
                assert load is not None, (layer, expert, self.slots)
            served.append(load.key)
            loads.append(load)
        self.release(served)
        return Use(hits, loads)

    def begin(self, layer: int, experts: Sequence[int]) -> tuple[dict[int, int], list[int]]:
        """Open a call of different experts: those that are there with their slots, and those that are not."""
        assert 0 <= layer < self.layers and len(set(experts)) == len(experts), (layer, experts)
        self._now += 1
        now, pool = self._now / self.layers, self._pool(layer)
        shared = 1 if self.policy.divided else self.layers
        self.sweeps = self.policy.guarded and len(experts) * shared > pool.size
        hits: dict[int, int] = {}
        missing: list[int] = []
        for expert in experts:
            key = layer, expert
            slot = self._slot.get(key)
            before = self._score.get(key, NEVER)
            self._score[key] = score = self.policy.score(before, now)
            # a call that sweeps through everything says nothing new about an expert that is loaded for it
            self._rank[key] = before if self.sweeps and (slot is None or key in self._ahead) else score
            if slot is None:
                missing.append(expert)
                continue
            hits[expert] = slot
            self._pinned.add(key)
            if key in self._guessed:
                self._adopt(key, pool)
        early = self._ahead.intersection((layer, expert) for expert in hits)
        self._ahead -= early
        for key in () if self.sweeps else self._lent.keys() - self._pinned:
            self._lent.pop(key).free.append(self._leave(key))
        self.hits += len(hits) - len(early)
        self.misses += len(missing) + len(early)
        return hits, missing

    def take(self, key: Key) -> Load | None:
        """A slot for an expert that is missing; None while everything there is in use."""
        assert key not in self._slot, key
        pool, gone = self._pool(key[0]), None
        if pool.free:
            slot = pool.free.pop()
        else:
            gone = self._victim(pool)
            if self.sweeps and not (gone and self._rank[gone] < self._rank[key]):
                if gone:
                    heapq.heappush(pool.heap, (self._rank[gone], gone))
                return self._pass(key, pool)
            if gone is None:
                return None
            slot = self._leave(gone)
        self._settle(key, slot, pool)
        self._pinned.add(key)
        return Load(key, slot, gone)

    def ahead(self, key: Key) -> Load | None:
        """A slot for an expert that the next layer's call of a sweep will miss, as if this layer missed one more.

        None where too few pass, or this is no sweep. It counts as missed when it is wanted.
        """
        if not self.sweeps:
            return None
        pool = self._pool(key[0])
        self._rank[key] = self._score.get(key, NEVER)
        load = self.take(key) if pool.free else self._pass(key, self._pool(key[0] - 1))
        if load:
            self._ahead.add(key)
        return load

    def release(self, keys: Iterable[Key]) -> None:
        """These were multiplied with, or were not loaded after all."""
        self._pinned.difference_update(keys)

    def drop(self, key: Key) -> None:
        """What is in the slot of an expert is not that expert: its loading failed."""
        slot = self._leave(key)
        self._pinned.discard(key)
        if key in self._guessed:
            del self._guessed[key]
            self._spare.append(slot)
            return
        pool = self._lent.pop(key, None) or self._pool(key[0])
        pool.free.append(slot)
        pool.heap = [entry for entry in pool.heap if entry[1] != key]
        heapq.heapify(pool.heap)

    def guess(self, key: Key) -> int | None:
        """A spare slot for an expert that may be wanted next, pinned until released; nobody is sent away for it.

        None where it is there already or no slot is spare. Guesses of the last call but one have had their time.
        """
        if key in self._slot:
            return None
        if not self._spare:
            old = next((one for one, at in self._guessed.items() if at < self._now), None)
            if old is None or old in self._pinned:
                return None
            del self._guessed[old]
            self._spare.append(self._slot.pop(old))
        self._slot[key] = slot = self._spare.pop()
        self._guessed[key] = self._now
        self._pinned.add(key)
        self.guesses += 1
        return slot

    def check(self) -> None:
        """Assert that every slot has one owner; for tests."""
        owned = [*self._slot.values(), *self._spare, *(slot for pool in self._pools for slot in pool.free)]
        assert sorted(owned) == list(range(self.slots)), (sorted(owned), self.slots)
        assert self._pinned | self._guessed.keys() | self._lent.keys() | self._ahead <= self._slot.keys()
        may_go = {key for pool in self._pools for _, key in pool.heap}
        assert may_go <= self._slot.keys() - self._lent and len(self._lent) <= self.passing

    def _pool(self, layer: int) -> _Pool:
        return self._pools[layer if self.policy.divided else 0]

    def _settle(self, key: Key, slot: int, pool: _Pool) -> None:
        """Give a key its slot; one that stays is not among those that may go."""
        self._slot[key] = slot
        if self._staying and (self._keep is None or key in self._keep):
            self._staying -= 1
        else:
            heapq.heappush(pool.heap, (self._rank[key], key))

    def _leave(self, key: Key) -> int:
        """The slot of an expert that is sent away."""
        self._ahead.discard(key)
        return self._slot.pop(key)

    def _pass(self, key: Key, home: _Pool) -> Load | None:
        """A slot that passes: of an expert that was served or, while there are few, of the least used of a pool."""
        gone = next((one for one in self._lent if one not in self._pinned), None)
        if gone:
            home = self._lent.pop(gone)
        elif len(self._lent) < self.passing:
            gone = self._victim(home)
        if gone is None:
            return None
        self._slot[key], self._lent[key] = self._leave(gone), home
        self._pinned.add(key)
        return Load(key, self._slot[key], gone)

    def _adopt(self, key: Key, pool: _Pool) -> None:
        """A guess was right: it stays where it is, and a slot that a miss would have got is the spare one instead."""
        gone = None if pool.free else self._victim(pool)
        if not pool.free and gone is None:
            return  # everything is in use: it remains a guess
        del self._guessed[key]
        self.right += 1
        self._spare.append(pool.free.pop() if gone is None else self._leave(gone))
        self._rank[key] = self._score[key]
        self._settle(key, self._slot[key], pool)

    def _victim(self, pool: _Pool) -> Key | None:
        """The key of the lowest score that is not in use, out of the heap.

        Scores only grow, so an entry that is behind is put where it belongs when it comes up, and not before.
        """
        aside, found = [], None
        while pool.heap:
            rank, key = pool.heap[0]
            if rank != self._rank[key]:
                heapq.heapreplace(pool.heap, (self._rank[key], key))
                continue
            heapq.heappop(pool.heap)
            if key not in self._pinned:
                found = key
                break
            aside.append((rank, key))
        for entry in aside:
            heapq.heappush(pool.heap, entry)
        return found


def cliff(slots: int, chosen: Sequence[int]) -> bool:
    """True where recency fails: one token goes through more experts than there are slots.

    With one layer's experts fewer still it finds nothing at all.

    Args:
        slots: How many there are.
        chosen: Experts that a token uses, by layer.
    """
    return slots < sum(chosen)


class Settled(NamedTuple):
    """The policy that is taken, and why if it is not the one that was asked for."""

    policy: str
    said: str = ""


def settle(slots: int, chosen: Sequence[int], policy: str = "auto") -> Settled:
    """The policy for so many slots: one that falls off the cliff is replaced by one that does not.

    "auto" divides slots among layers where each gets at least two tokens' experts, which also keeps what the token
    before used; with fewer, layers whose experts are used again and again do better with a larger share.

    Raises:
        ConfigError: no such policy, or not even one layer's experts of one token have slots.
    """
    least = max(chosen)
    require(slots >= least, f"{slots} slots are too few: a token uses {least} experts of a layer at once")
    if policy == "auto":
        return Settled("layered" if slots >= 2 * len(chosen) * least else "lfru")
    require(policy in POLICIES, f"there is no policy {policy!r}", f"there are auto, {', '.join(POLICIES)}")
    one = POLICIES[policy]
    words = f"{slots} slots are fewer than the {sum(chosen)} experts that a token goes through"
    if one.divided and slots < len(chosen) * least:
        return Settled("lfru", f"{words}, so they are not divided among {len(chosen)} layers: lfru is used")
    if not one.guarded and not one.stays and cliff(slots, chosen):
        return Settled("lfru", f"{words}: {policy} would find next to none of them, so lfru is used")
    return Settled(policy)


def belady(calls: Sequence[tuple[int, Sequence[int]]], slots: int) -> tuple[int, int]:
    """Hits and misses of the best that could be done by who knows the future (Belady 1966).

    After each call those stay whose next use is nearest; what the call used need not, it may have passed through.

    Args:
        calls: (layer, its different experts), in order.
        slots: How many there are.
    """
    later: dict[Key, list[int]] = {}
    for at in range(len(calls) - 1, -1, -1):
        layer, experts = calls[at]
        for expert in experts:
            later.setdefault((layer, expert), []).append(at)
    here: dict[Key, int] = {}
    heap: list[tuple[int, Key]] = []  # the farthest next use first; entries that are behind are skipped
    hits = misses = 0
    for layer, experts in calls:
        keys = [(layer, expert) for expert in experts]
        found = sum(key in here for key in keys)
        hits, misses = hits + found, misses + len(keys) - found
        for key in keys:
            uses = later[key]
            uses.pop()
            here[key] = uses[-1] if uses else len(calls)
            heapq.heappush(heap, (-here[key], key))
        while len(here) > slots:
            when, key = heapq.heappop(heap)
            if here.get(key) == -when:
                del here[key]
    return hits, misses

"""Samples as they are trained on: one sequence each, kept in one file, in an order that follows from a seed.

A micro-batch takes whole samples while they fit. Packed, they stand behind each other in one row of which each
attends to itself alone; padded, each has a row. Which ones it takes depends on the order alone, so that a run goes on
from a number of samples seen.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from moiety.errors import DataError, FormatError, MoietyError, UsageError
from moiety.model.tensor_file import read_tensors
from moiety.model.tokenizer import Tokenizer
from moiety.storage import write_atomically
from moiety.train.chats import Encoder, Sample, read_lines
from moiety.train.data import IGNORED, SPLITS, Batch, Preference, epoch_order
from moiety.train.finetune_options import FinetuneOptions

__all__ = ["Prepared", "Samples", "prepare"]

Integers = npt.NDArray[np.int64]


class Prepared(NamedTuple):
    """Samples, what a person should know about them, and the tokens that ended their answers."""

    samples: Samples
    notes: tuple[str, ...]
    ends: tuple[int, ...]


def prepare(sources: Sequence[str], tokenizer: Tokenizer, options: FinetuneOptions, length: int) -> Prepared:
    """Read files of JSON lines; see `chats.Encoder` for what a line may be.

    Args:
        sources: Files; the samples of one are a domain, named by the file or by `FILE:domain=NAME`.
        tokenizer: The model's, with its chat template.
        options: What is learnt, and how much is held out.
        length: Most tokens of a sample.

    Raises:
        DataError: a file or a line that is not what is allowed, named by its number; or nothing to train on.
    """
    encoder = Encoder(tokenizer, turns=options.turns, length=length, too_long=options.too_long)
    units: list[tuple[Sample, ...]] = []
    domain_of: list[str] = []
    for source in sources:
        path, _, name = source.partition(":domain=")
        before = len(units)
        for number, value in read_lines(Path(path)):
            try:
                found = encoder.units(value)
            except MoietyError as error:
                raise DataError(f"{path}, line {number}: {error.message}", hint=error.hint) from error
            if found and units and len(found[0]) != len(units[0]):
                raise DataError(
                    f"{path}, line {number}: pairs and single answers cannot be trained on together",
                    hint="give files with chosen and rejected by themselves",
                )
            units += found
        if len(units) == before:
            raise DataError(
                f"{path} has no sample to train on", hint="its lines are empty or longer than --length"
            )
        domain_of += [name or Path(path).stem] * (len(units) - before)
    held_out = [_is_held_out(unit, options.held_out) for unit in units]
    if all(held_out):
        raise DataError(f"all {len(units)} samples would be held out", hint="give more, or lower --held-out")
    domains = tuple(sorted({*domain_of}))
    tensors = {
        "tokens": torch.tensor(
            [token for unit in units for one in unit for token in one.tokens], dtype=torch.int32
        ),
        "learnt": torch.tensor([learnt for unit in units for one in unit for learnt in one.learnt]),
        "counts": torch.tensor([len(one.tokens) for unit in units for one in unit]),
        "domain": torch.tensor([domains.index(name) for name in domain_of], dtype=torch.int32),
        "held_out": torch.tensor(held_out),
        "token_bytes": torch.tensor(tokenizer.byte_counts()),
    }
    notes = [f"{count:,} {what}" for what, count in encoder.counts.items()]
    trained_on = {name for name, held in zip(domain_of, held_out, strict=True) if not held}
    evaluated = {name for name, held in zip(domain_of, held_out, strict=True) if held}
    notes += [
        f"nothing of {name} is held out, so it is not evaluated" for name in sorted(trained_on - evaluated)
    ]
    same = sum(times - 1 for times in Counter(units).values())
    notes += [f"{same:,} samples are repeated"] * bool(same)
    samples = Samples(tensors, domains, pack=options.pack, beta=options.beta)
    return Prepared(samples, tuple(notes), tuple(encoder.ends))


def _is_held_out(unit: Sequence[Sample], share: float) -> bool:
    """By content, so that a sample that is there twice is never on both sides."""
    digest = hashlib.sha256(str([one.tokens for one in unit]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@final
class Samples:
    """Samples in memory: a `data.Source`.

    A unit is a sample, or the two answers of a pair behind each other.

    Args:
        tensors: `tokens` and `learnt` of all samples behind each other, `counts` of tokens of each sample; of each unit
            `domain` and whether it is `held_out`; `token_bytes` of the vocabulary; of pairs perhaps `reference`.
        domains: Names.
        pack: Put samples behind each other in one row; otherwise pad.
        beta: Of pairs.
        most_units: The batches end after so many; 0 is never.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        domains: tuple[str, ...],
        *,
        pack: bool,
        beta: float,
        most_units: int = 0,
    ) -> None:
        self.tensors, self.domains, self.pack, self.beta = tensors, domains, pack, beta
        self.most_units = most_units
        count_N = tensors["counts"].numpy()
        self.answers = len(count_N) // len(tensors["domain"])
        self._tokens: Integers = tensors["tokens"].numpy().astype(np.int64)
        self._learnt = tensors["learnt"].numpy()
        self._token_bytes: Integers = tensors["token_bytes"].numpy()
        self._stops: Integers = np.cumsum(count_N)
        self._starts: Integers = self._stops - count_N
        self._domain = tensors["domain"].numpy()
        self._inputs: Integers = (count_N - 1).reshape(-1, self.answers)  # the last token is only a target
        held_U = tensors["held_out"].numpy()
        self._split = dict(zip(SPLITS, (np.flatnonzero(~held_U), np.flatnonzero(held_U)), strict=True))

    @classmethod
    def load(
        cls, file: Path, domains: tuple[str, ...], *, pack: bool, beta: float, fingerprint: str
    ) -> Samples:
        """What `save` wrote.

        Raises:
            FormatError: it is missing, damaged or of another run.
        """
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise FormatError(f"cannot read {file}: {error.strerror}", hint="start the run anew") from error
        if found != fingerprint:
            raise FormatError(f"{file} is not what the run was started with", hint="start the run anew")
        return cls(read_tensors(file), domains, pack=pack, beta=beta)

    @property
    def fingerprint(self) -> str:
        """sha256 of what `save` writes."""
        return hashlib.sha256(safetensors.torch.save(self.tensors)).hexdigest()

    def save(self, file: Path) -> None:
        """Write all of it.

        Raises:
            StorageError: the system refused.
        """
        write_atomically(file, safetensors.torch.save(self.tensors))

    @property
    def units(self) -> int:
        """Samples, or pairs, to train on in an epoch."""
        return len(self._split["train"])

    def micro_batches(self, *, room: int, seed: int, units: int) -> int:
        """How many it takes until so many units were seen."""
        count = seen = 0
        for taken in self._taken(room, seed, 0, units):
            count, seen = count + 1, seen + len(taken)
        return count

    def sizes(self, split: str = "train") -> dict[str, dict[str, int]]:
        """By domain the units (`documents`), tokens, learnt tokens, and bytes of what is learnt."""
        chosen = self._split[split]
        found = {}
        for number, name in enumerate(self.domains):
            units = chosen[self._domain[chosen] == number]
            tokens = learnt = size = 0
            for unit in units:
                for one in self._of(int(unit)):
                    part = slice(int(self._starts[one]), int(self._stops[one]))
                    target = self._tokens[part][self._learnt[part]]
                    tokens, learnt = tokens + part.stop - part.start, learnt + len(target)
                    size += int(self._token_bytes[target].sum())
            found[name] = {"documents": len(units), "tokens": tokens, "learnt": learnt, "size_bytes": size}
        return found

    def batches(self, *, B: int, S: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Training batches, the same from any `start` on as in one go; none reaches into the next epoch.

        Args:
            B: A batch has room for B * S tokens, padding included; a unit that is larger is one by itself.
            S: See B.
            seed: Of the order.
            start: Units seen, `Batch.sequences_seen` of the last batch used.

        Raises:
            UsageError: a number out of range.
        """
        if B < 1 or S < 1 or start < 0 or not 0 <= seed < 1 << 64:
            raise UsageError(
                f"batches(B={B}, S={S}, seed={seed}, start={start}): B and S must be positive, start not negative, "
                "seed 0 to 2**64 - 1"
            )
        return self._training(B * S, seed, start)

    def _training(self, room: int, seed: int, start: int) -> Iterator[Batch]:
        for taken in self._taken(room, seed, start, self.most_units):
            epoch, start = start // self.units, start + len(taken)
            yield self._batch(taken, seen=start, epoch=epoch, pack=self.pack)

    def evaluation(self, domain: str, *, B: int, S: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out samples of one domain, in order and padded; arguments as for `batches`."""
        chosen = self._split["held_out"]
        units = chosen[self._domain[chosen] == self.domains.index(domain)][:limit]
        return self._in_order(units, B * S)

    def everything(self, room: int) -> Iterator[Batch]:
        """All units, those that are held out too, in order."""
        return self._in_order(np.arange(len(self._domain)), room)

    def with_reference(self, reference_N: Tensor) -> Samples:
        """The same pairs with the log-probability of each answer before training."""
        tensors = {**self.tensors, "reference": reference_N}
        return Samples(tensors, self.domains, pack=self.pack, beta=self.beta, most_units=self.most_units)

    def sample(self, place: int) -> Sample:
        """One sample, counted from the first line on."""
        part = slice(int(self._starts[place]), int(self._stops[place]))
        return Sample(tokens=tuple(self._tokens[part].tolist()), learnt=tuple(self._learnt[part].tolist()))

    def _of(self, unit: int) -> range:
        return range(unit * self.answers, (unit + 1) * self.answers)

    def _taken(self, room: int, seed: int, start: int, most: int) -> Iterator[Integers]:
        """Units of one micro-batch after the other, from so many units seen on until `most`; 0 is without end."""
        while True:
            epoch, place = divmod(start, self.units)
            order = self._split["train"][epoch_order(self.units, seed, epoch)]
            while place < self.units:
                if most and start >= most:
                    return
                count = self._fitting(order[place:], room, self.pack)
                count = min(count, most - start) if most else count
                yield order[place : place + count]
                place, start = place + count, start + count

    def _fitting(self, units: Integers, room: int, pack: bool) -> int:
        """How many of the first units fit; at least one."""
        tokens = longest = rows = 0
        for count, unit in enumerate(units):
            inputs = self._inputs[unit]
            tokens, longest, rows = (
                tokens + int(inputs.sum()),
                max(longest, int(inputs.max())),
                rows + len(inputs),
            )
            if (tokens if pack else longest * rows) > room:
                return max(count, 1)
        return len(units)

    def _in_order(self, units: Integers, room: int) -> Iterator[Batch]:
        while len(units):
            count = self._fitting(units, room, False)
            yield self._batch(units[:count], seen=count, epoch=0, pack=False)
            units = units[count:]

    def _batch(self, units: Integers, *, seen: int, epoch: int, pack: bool) -> Batch:
        places = [place for unit in units for place in self._of(int(unit))]
        parts = [slice(int(self._starts[place]), int(self._stops[place])) for place in places]
        inputs = [torch.from_numpy(self._tokens[part][:-1]) for part in parts]
        targets = [
            torch.from_numpy(np.where(self._learnt[part], self._tokens[part], IGNORED)[1:]) for part in parts
        ]
        domains = [
            torch.full((len(one),), int(self._domain[place // self.answers]), dtype=torch.int32)
            for place, one in zip(places, inputs, strict=True)
        ]
        scored = torch.cat(targets).numpy()
        reference_N = self.tensors.get("reference")
        batch = Batch(
            tokens_BS=torch.cat(inputs)[None],
            targets_BS=torch.cat(targets)[None],
            domain_BS=torch.cat(domains)[None],
            target_bytes=int(self._token_bytes[scored[scored != IGNORED]].sum()),
            sequences_seen=seen,
            epoch=epoch,
            lengths=tuple(map(len, inputs)),
            preference=None if reference_N is None else Preference(reference_N[places], self.beta),
        )
        if pack:
            return batch
        pad = torch.nn.utils.rnn.pad_sequence
        counts_N = torch.tensor(batch.lengths)
        return replace(
            batch,
            tokens_BS=pad(inputs, batch_first=True),
            targets_BS=pad(targets, batch_first=True, padding_value=IGNORED),
            domain_BS=pad(domains, batch_first=True),
            lengths=(),
            valid_BS=torch.arange(int(counts_N.max())) < counts_N[:, None],
        )

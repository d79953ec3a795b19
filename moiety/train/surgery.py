"""`moiety prune` and `moiety merge`: a checkpoint with fewer experts, and a receipt of what that did to it.

The model is read a block at a time, to look at its experts, to score it before and after, and to write what is left:
in memory are one block and the hidden states of the text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moiety import cost, storage, tracefile
from moiety.errors import ConfigError, DataError, UsageError
from moiety.model import checkpoint
from moiety.model.convert import read_tokenizer, write_beside
from moiety.model.layout import write_json
from moiety.model.load import is_switch
from moiety.model.parts import Parts, hollow, run
from moiety.moe import surgery
from moiety.moe.layer import MoE
from moiety.moe.surgery import Evidence, Kind, Plan, Round
from moiety.routing import Routing
from moiety.train.data import Batch
from moiety.train.evaluate import real_tokens
from moiety.train.expert_options import SurgeryOptions
from moiety.train.options import HeldOutOptions
from moiety.train.quality import Quality, row, sums_of
from moiety.train.run import held_out

__all__ = ["RECEIPT", "operate"]

RECEIPT = "surgery.json"
Batches = Mapping[str, Sequence[Batch]]


def operate(
    kind: Kind,
    place: Path,
    target: str | Path | None,
    sources: Sequence[str],
    options: SurgeryOptions,
    text: HeldOutOptions,
    *,
    align: bool = True,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Drop or merge experts, score both models on text that nothing was decided by, and write what is left.

    Args:
        kind: "prune" or "merge".
        place: A checkpoint folder; it is left alone.
        target: A folder; None writes nothing.
        sources: Text, as for `moiety train`. The first half of each domain's held-out sequences is what experts are
            looked at with, the other half is scored.
        options: How many, and by what.
        text: How much text.
        align: Match neurons before a mean of weights is taken.
        say: Told what is going on.

    Returns:
        The receipt, which is also in the folder: the plan, sizes, and both models' figures.

    Raises:
        UsageError: a model that is packed, a GGUF or an encoder-decoder, or the source is the target.
        ConfigError: nothing can be dropped or merged so.
        DataError: too little text.
        FormatError, StorageError: as of reading and writing checkpoints.
    """
    by = _criterion(kind, options)
    _refuse(place, target)
    with checkpoint.open_parts(place) as parts:
        surgery.check_model(parts.config, kind)
        batches, notes = held_out(sources, read_tokenizer(place), parts.config.max_positions, text)
        for note in notes:
            say(note)
        seen, scored = _halves(batches)
        evidence = _evidence(kind, by, parts, seen, options, say)
        plan = _plan(kind, by, parts, evidence, options)
        changed = _Changed(parts, plan, evidence, align)
        left = Parts(config=surgery.after(parts.config, plan), dtypes=parts.dtypes, read=changed)
        say(f"scoring both models on {sum(tokens_BS.numel() for tokens_BS, _ in _inputs(scored)):,} tokens")
        said = {
            **plan.said(),
            "by": by or "the plan",
            "criterion": surgery.CRITERIA[kind].get(by, "given"),
            "aligned": align and kind == "merge",
            **_compared(place, parts, left, scored),
        }
        if target is not None:
            _write(place, target, left, said)
    return said


def _write(place: Path, target: str | Path, left: Parts, said: dict[str, Any]) -> None:
    """The folder, its receipt in it, and in the receipt how it is laid out."""
    model = hollow(left.config, left.dtypes)
    with storage.new_folder(target, needed_bytes=checkpoint.size_bytes(model) + (1 << 24)) as folder:
        said["layout"] = write_beside(folder, model, place, fetch=left.fetch)
        write_json(folder / RECEIPT, said)


def _criterion(kind: Kind, options: SurgeryOptions) -> str:
    """The criterion asked for; none where a plan says all."""
    known = surgery.CRITERIA[kind]
    if sum(map(bool, (options.experts_per_layer, options.drop_share, options.plan))) != 1:
        raise UsageError(
            "one of experts_per_layer, drop_share and plan is wanted",
            hint="--experts-per-layer 4, or --drop-share 0.25",
        )
    if options.plan and options.by:
        raise ConfigError(
            f"by is {options.by!r}, but the plan says what to {kind} already", hint="leave --by out"
        )
    by = options.by or (
        "" if options.plan else "load" if options.trace and kind == "prune" else next(iter(known))
    )
    if by and by not in known:
        raise ConfigError(f"by is {by!r}; to {kind}, allowed are {', '.join(known)}")
    return by


def _refuse(place: Path, target: str | Path | None) -> None:
    if checkpoint.is_gguf(place):
        raise UsageError(f"{place} is a GGUF", hint="`moiety convert` makes a folder of it first")
    if is_switch(place):
        raise UsageError(f"{place} is an encoder-decoder, whose layers all have the same experts")
    if target is not None and Path(target).resolve() == place.resolve():
        raise UsageError(f"{place} is source and target", hint="write somewhere else")


def _halves(batches: Batches) -> tuple[Batches, Batches]:
    """What is looked at and what is scored: of each domain the first and the second half of its batches."""
    short = [domain for domain, part in batches.items() if len(part) < 2]
    if short:
        raise DataError(
            f"{', '.join(short)}: too little text to decide by one half and score the other",
            hint="a smaller --batch or --length, or more text",
        )
    cut = {domain: len(part) // 2 for domain, part in batches.items()}
    return (
        {domain: part[: cut[domain]] for domain, part in batches.items()},
        {domain: part[cut[domain] :] for domain, part in batches.items()},
    )


def _inputs(batches: Batches) -> list[tuple[Tensor, Tensor | None]]:
    return [(one.tokens_BS, real_tokens(one.targets_BS)) for part in batches.values() for one in part]


def _evidence(
    kind: Kind,
    by: str,
    parts: Parts,
    seen: Batches,
    options: SurgeryOptions,
    say: Callable[[str], object],
) -> dict[int, Evidence]:
    """What each layer's experts did, from a trace or from running the model here."""
    if options.trace:
        if by == "output":
            raise ConfigError(
                "a trace does not say what experts answered", hint="--by router, or leave --trace out"
            )
        needs = "weight" if by == "weight" else "load"
        return surgery.evidence_of_trace(
            tracefile.read(options.trace), parts.config, needs if by != "reap" else by
        )
    if kind == "prune" and options.plan:
        return {}
    config, moe = parts.config, parts.config.moe
    assert moe is not None
    width = config.d_model if by == "output" else 0
    found = {layer: Evidence.of(moe.at(layer).experts, width) for layer in config.moe_layers}
    inputs = _inputs(seen)
    say(f"looking at experts on {sum(tokens_BS.numel() for tokens_BS, _ in inputs):,} tokens")

    def see(layer: int, module: nn.Module, x_TD: Tensor, routing: Routing | None) -> None:
        if routing is not None:
            assert isinstance(module, MoE), type(module)
            found[layer].add(module, x_TD, routing)

    run(parts, inputs, see)
    return found


def _plan(
    kind: Kind,
    by: str,
    parts: Parts,
    evidence: Mapping[int, Evidence],
    options: SurgeryOptions,
) -> Plan:
    if options.plan:
        plan = surgery.plan_from(storage.read_json(Path(options.plan)), parts.config)
        if plan.kind != kind:
            raise ConfigError(f"{options.plan} is a plan to {plan.kind}", hint=f"moiety {plan.kind}")
        return plan
    rounds: dict[int, list[Round]] = {}
    moe = parts.config.moe
    assert moe is not None
    for layer, found in evidence.items():
        one = moe.at(layer)
        if kind == "prune":
            rounds[layer] = surgery.drops(found.score_E(by, options.seed + layer), one)
            continue
        point_EX = found.output_ED
        if by == "router":
            gate = f"blocks.{layer}.feed_forward.gate.weight"
            if gate not in parts.dtypes:
                raise ConfigError(f"router {one.router!r} has no rows to compare", hint="--by output")
            point_EX = torch.nn.functional.normalize(parts.read(gate)[: one.experts].double())
        elif by == "random":
            point_EX = torch.randn(
                one.experts, 16, generator=torch.Generator().manual_seed(options.seed + layer)
            )
        assert point_EX is not None, by
        rounds[layer] = surgery.merges(point_EX, one)
    return surgery.allocate(
        rounds, parts.config, kind, experts=options.experts_per_layer, share=options.drop_share
    )


class _Changed:
    """The tensors of the model afterwards, each made when it is asked for; the last one is kept."""

    def __init__(self, parts: Parts, plan: Plan, evidence: Mapping[int, Evidence], align: bool) -> None:
        assert parts.config.moe is not None
        self._moe, self._read, self._plan, self._evidence = parts.config.moe, parts.read, plan, evidence
        self._align = align and plan.kind == "merge"
        self._orders: dict[int, dict[int, Tensor]] = {}
        self._last = functools.lru_cache(maxsize=1)(self._made)

    def __call__(self, name: str) -> Tensor:
        return self._last(name)

    def _made(self, name: str) -> Tensor:
        found = re.fullmatch(r"(blocks\.(\d+)\.feed_forward\.)(.+)", name)
        groups = self._plan.layers.get(int(found[2])) if found else None
        if found is None or groups is None:
            return self._read(name)
        layer, leaf = int(found[2]), found[3]
        if self._align and layer not in self._orders:
            self._orders[layer] = self._order(found[1], groups, layer)
        share_E = self._evidence[layer].counts_E if layer in self._evidence else None
        return surgery.changed(
            leaf,
            self._read(name),
            self._plan.kind,
            groups,
            experts=self._moe.at(layer).experts,
            share_E=share_E,
            orders=self._orders.get(layer),
        )

    def _order(self, before: str, groups: Sequence[tuple[int, ...]], layer: int) -> dict[int, Tensor]:
        """The order of neurons of every expert that is merged; its group's most used one is what others follow."""
        up = self._read(f"{before}experts.{'gate_up' if self._moe.gated else 'up'}")
        down = self._read(f"{before}experts.down")
        counts_E = self._evidence[layer].counts_E
        found: dict[int, Tensor] = {}
        for group in groups:
            if len(group) > 1:
                order = sorted(group, key=lambda number: -float(counts_E[number]))
                found |= surgery.aligned(up, down, order, self._moe.gated)
        return found


def _compared(place: Path, parts: Parts, left: Parts, scored: Batches) -> dict[str, Any]:
    """Both models' sizes, and what they make of the same text, domain by domain."""
    both = {"before": parts, "after": left}
    outputs = {name: run(one, _inputs(scored)) for name, one in both.items()}
    figures: dict[str, dict[str, Quality]] = {name: {} for name in both}
    for name, made in outputs.items():
        pairs = zip(outputs["before"], made, strict=True)
        for domain, part in scored.items():
            sums = [sums_of(*next(pairs), one.targets_BS, parts.config.vocab_size) for one in part]
            figures[name][domain] = Quality.of(sums, sum(one.target_bytes for one in part))
    counts = [cost.parameters(one.config) for one in both.values()]
    was, now = parts.config.moe, left.config.moe
    assert was is not None and now is not None
    return {
        "model": str(place),
        "parameters": [one.total for one in counts],
        "active_parameters": [one.active for one in counts],
        "experts": [[layer, was.at(layer).stored, now.at(layer).stored] for layer in parts.config.moe_layers],
        "quality": [
            row(str(place), name, checkpoint.size_bytes(hollow(one.config, one.dtypes)), figures[name])
            for name, one in both.items()
        ],
    }

"""What is stored of a model: every matrix, in which format, and what that takes. No torch.

A format here is `fp32`, `bf16` or `fp16` for weights that are not packed, or what `moiety quantize` takes: routers,
norms, biases and embedding stay as they are. Sizes are those of tiles on disk and in memory: with scales, and with
rows and columns padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moiety import cost, storage
from moiety.config import Architecture, ModelConfig
from moiety.errors import ConfigError, FormatError
from moiety.formats import FORMATS, format_named, shape_of
from moiety.formats.policy import PARTS, kind_of, policy_named

__all__ = ["PLAIN", "Matrix", "Part", "Stored", "gigabytes", "matrices", "read_stored", "stored_as"]

PLAIN: Mapping[str, int] = {"fp32": 32, "bf16": 16, "fp16": 16}


class Matrix(NamedTuple):
    """Some matrices of one shape.

    Args:
        part: A kind of `formats.policy`; "kv_b" is the part of latent attention that is never packed.
        layers: That have it.
        experts: E, 1 for a plain matrix.
        rows: Of one.
        columns: Of one.
        halves: 2 if gate and up rows alternate.
    """

    part: str
    layers: int
    experts: int
    rows: int
    columns: int
    halves: int = 1

    @property
    def numbers(self) -> int:
        """Weights in all of them."""
        return self.layers * self.experts * self.rows * self.columns


class Part(NamedTuple):
    """The matrices of one part in one format.

    Args:
        kind: As `Matrix.part`.
        form: A name of `PLAIN` or of `FORMATS`.
        numbers: Weights.
        size_bytes: Of them, with scales and padding.
    """

    kind: str
    form: str
    numbers: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A model's weights as they are stored.

    Args:
        form: As it was asked for, or "as stored".
        parts: Of all matrices; the look-up of tokens is "embedding".
        rest_bytes: Norms, biases, sinks.
    """

    form: str
    parts: tuple[Part, ...]
    rest_bytes: int

    @property
    def size_bytes(self) -> int:
        """Of everything."""
        return sum(part.size_bytes for part in self.parts) + self.rest_bytes

    @property
    def expert_bytes(self) -> int:
        """Of all routed experts."""
        return sum(part.size_bytes for part in self.parts if part.kind == "experts")

    @property
    def looked_up_bytes(self) -> int:
        """Of the embedding, if it is not the head too."""
        sizes = {part.kind: part.size_bytes for part in self.parts}
        return sizes["embedding"] if sizes.get("head") else 0

    @property
    def is_plain(self) -> bool:
        """Nothing is packed."""
        return all(part.form in PLAIN for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """The mean over all matrices."""
        return 8 * sum(part.size_bytes for part in self.parts) / sum(part.numbers for part in self.parts)


def matrices(config: ModelConfig) -> list[Matrix]:
    """Every matrix of a decoder; a tied head is listed like another one, because every token is multiplied with it."""
    d_model, attention, layers, moe = config.d_model, config.attention, config.layers, config.moe
    found = [
        Matrix("embedding", 1, 1, config.vocab_size, d_model),
        Matrix("head", 1, 1, config.vocab_size, d_model),
    ]
    mla = attention.mla
    if mla is None:
        query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        found += [
            Matrix("attention", layers, 1, query, d_model),
            Matrix("attention", 2 * layers, 1, key, d_model),
        ]
        found.append(Matrix("attention", layers, 1, d_model, query))
    else:
        query = attention.heads * (mla.nope_dim + mla.rope_dim)
        if mla.q_rank:
            found.append(Matrix("attention", layers, 1, mla.q_rank, d_model))
        found += [
            Matrix("attention", layers, 1, query, mla.q_rank or d_model),
            Matrix("attention", layers, 1, mla.kv_rank + mla.rope_dim, d_model),
            Matrix("kv_b", layers, 1, attention.heads * (mla.nope_dim + mla.value_dim), mla.kv_rank),
            Matrix("attention", layers, 1, d_model, attention.heads * mla.value_dim),
        ]
    dense = layers - len(config.moe_layers)
    found += _feed_forward("dense", dense, 1, config.d_ff, d_model, config.gated)
    if moe is not None:
        for one, count in Counter(moe.at(layer) for layer in config.moe_layers).items():
            found += _feed_forward("experts", count, one.stored, one.d_ff, d_model, one.gated)
            found += _feed_forward("shared", count, 1, one.shared_d_ff, d_model, one.gated)
            columns = one.router_matrices * one.choices + int(one.shared_gate)
            found.append(Matrix("router", count, 1, columns, d_model))
    return [one for one in found if one.numbers]


def _feed_forward(part: str, count: int, experts: int, d_ff: int, d_model: int, gated: bool) -> list[Matrix]:
    halves = 2 if gated else 1
    up = Matrix(part, count, experts, halves * d_ff, d_model, halves)
    return [up, Matrix(part, count, experts, d_model, d_ff)]


def stored_as(config: ModelConfig, form: str, *, kept: str = "bf16") -> Stored:
    """A model in a format.

    Args:
        config: The model's.
        form: A name of `PLAIN`, or what `moiety quantize` takes.
        kept: What a packed model's other weights are in: a name of `PLAIN`.

    Raises:
        ConfigError: no such format.
    """
    if kept not in PLAIN:
        raise ConfigError(f"kept is {kept!r}; allowed are {', '.join(PLAIN)}")
    found = matrices(config)
    vectors = cost.parameters(config).total - sum(
        one.numbers for one in found if not (one.part == "head" and config.tied)
    )
    if form in PLAIN:
        parts = [
            Part(one.part, form, one.numbers, one.numbers * PLAIN[form] // 8)
            for one in _by_part(found)
            if not (one.part == "head" and config.tied)
        ]
        if config.tied:  # it is multiplied with where it is looked up
            parts.append(Part("head", form, config.vocab_size * config.d_model, 0))
        return Stored(form=form, parts=tuple(parts), rest_bytes=vectors * PLAIN[form] // 8)
    try:
        policy = policy_named(form)
    except ConfigError as error:
        raise ConfigError(error.message, hint=f"{error.hint}; {', '.join(PLAIN)} are not packed") from error
    chosen = {part: getattr(policy, part) for part in PARTS}
    sums: dict[tuple[str, str], list[int]] = {}
    for one in found:
        name = chosen.get(one.part, "") or kept
        size = (
            _packed_bytes(one, name)
            if name in FORMATS and name not in PLAIN
            else one.numbers * PLAIN[name] // 8
        )
        if one.part == "head" and config.tied and name == kept:
            size = 0
        total = sums.setdefault((one.part, name), [0, 0])
        total[0], total[1] = total[0] + one.numbers, total[1] + size
    parts = [Part(kind, name, numbers, size) for (kind, name), (numbers, size) in sums.items()]
    return Stored(form=form, parts=tuple(parts), rest_bytes=vectors * PLAIN[kept] // 8)


def _by_part(found: Sequence[Matrix]) -> list[Matrix]:
    """One entry for each part, whose numbers are the sum."""
    sums: dict[str, int] = {}
    for one in found:
        sums[one.part] = sums.get(one.part, 0) + one.numbers
    return [Matrix(part, 1, 1, numbers, 1) for part, numbers in sums.items()]


def _packed_bytes(one: Matrix, form: str) -> int:
    return one.layers * _tiles_bytes(form, one.experts, one.rows, one.columns, one.halves == 2)


def _tiles_bytes(form: str, experts: int, rows: int, columns: int, interleaved: bool) -> int:
    shape = shape_of(format_named(form), experts=experts, rows=rows, columns=columns, interleaved=interleaved)
    return shape[0] * shape[1] * shape[2] * shape[3]


def read_stored(path: Path, config: ModelConfig) -> Stored:
    """What lies in a folder, or in a GGUF file, by sizes alone: no weight is read.

    Raises:
        FormatError: a packed folder whose `config.json` does not say what is packed, or no weights at all.
    """
    if path.suffix == ".gguf":
        return _spread(config, path.stat().st_size)
    said = storage.read_json(storage.inside(path, "config.json"))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FormatError(
            f"{path} has no weights (*.safetensors)", hint="name a format (--format int4-g32) to plan for"
        )
    total = sum(file.stat().st_size for file in files)
    packed = said.get("quantization_config")
    if not isinstance(packed, dict) or packed.get("quant_method") != "moiety":
        return _spread(config, total)
    return _packed(path, config, packed, total)


def _spread(config: ModelConfig, size_bytes: int) -> Stored:
    """Weights of which only the sum is known, shared out by their number."""
    count = cost.parameters(config).total
    bits = 8 * size_bytes / count
    form = "fp32" if bits > 24 else "bf16" if bits > 12 else "int8-g32" if bits > 6.5 else "int4-g32"
    parts = [
        Part(
            one.part,
            form,
            one.numbers,
            0 if config.tied and one.part == "head" else size_bytes * one.numbers // count,
        )
        for one in _by_part(matrices(config))
    ]
    rest = size_bytes - sum(part.size_bytes for part in parts)
    return Stored(form="as stored", parts=tuple(parts), rest_bytes=rest)


def _packed(path: Path, config: ModelConfig, said: Mapping[str, Any], total: int) -> Stored:
    """A packed folder: what `config.json` says of each stack, and the rest by what the files hold besides."""
    tensors = said.get("tensors")
    if not isinstance(tensors, dict):
        raise FormatError(f"{path / 'config.json'} has no tensors in quantization_config")
    sums: dict[tuple[str, str], list[int]] = {}
    for name, one in tensors.items():
        try:
            experts, rows, columns = (int(one[key]) for key in ("experts", "rows", "columns"))
            form, interleaved = format_named(one["format"]).name, bool(one["interleaved"])
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise FormatError(f"{path / 'config.json'} says of {name}: {error!r}") from error
        pair = sums.setdefault((kind_of(name), form), [0, 0])
        pair[0] += experts * rows * columns
        pair[1] += _tiles_bytes(form, experts, rows, columns, interleaved)
    parts = [Part(kind, form, numbers, size) for (kind, form), (numbers, size) in sums.items()]
    left = {one.part: one.numbers for one in _by_part(matrices(config))}
    for part in parts:
        left[part.kind] = left.get(part.kind, 0) - part.numbers
    kept = sum(count for count in left.values() if count > 0)
    free = max(total - sum(part.size_bytes for part in parts), 0)
    form = "fp32" if free > 3 * kept else "bf16"
    parts += [
        Part(kind, form, count, min(count * PLAIN[form] // 8, free))
        for kind, count in left.items()
        if count > 0
    ]
    rest = max(total - sum(part.size_bytes for part in parts), 0)
    return Stored(form="as stored", parts=tuple(parts), rest_bytes=rest)


def gigabytes(config: Architecture) -> dict[str, float]:
    """Decimal GB of all weights by format: as many bits as the name says, and ours with scales, padding apart."""
    labels: dict[str, float] = {"fp32": 32, "bf16": 16, "8bit": 8, "4bit": 4}
    labels |= {name: form.bits_per_weight for name, form in FORMATS.items() if name not in ("f32", "bf16")}
    return {label: cost.weight_bytes(config, bits) / 1e9 for label, bits in labels.items()}

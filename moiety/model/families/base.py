"""The machinery of families: a table of keys and names, read in both directions.

A family is one `Family`: which key of its `config.json` is which of our options, which options it fixes, and for
each of our tensors the names of theirs that hold it. `{l}` stands for the layer and `{e}` for the expert. What one
key cannot say alone (windows, dense layers, rotary positions) is a `Rule` over several. No torch here: this is
names and numbers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from moiety.config import ModelConfig, from_dict, to_dict
from moiety.errors import ConfigError, FormatError
from moiety.model.families.values import ACTIVATIONS, WITHOUT_EFFECT, Values

__all__ = ["Family", "FamilyChoice", "Match", "Piece", "Rule", "Stored"]

Shapes = Mapping[str, Sequence[int]]
Match = Literal["original", "hf"]
# What only training reads, whatever the model.
TRAINING = ("moe.balance_loss", "moe.z_loss", "moe.bias_rate")


class Piece(NamedTuple):
    """A tensor of theirs, and the part of ours that it holds. Theirs is always whole.

    The part of ours is found in four steps, each a view (no copy):
    1. `ours[expert]`, or all of `ours` when `expert` is None;
    2. rows `start` to `stop` along `axis`;
    3. if `interleaved`: axis split into (2, n) and these two swapped, so that row i of the first half (gate)
       stands beside row i of the second (up), as theirs has them;
    4. if `transposed`: the last axis moved to where `axis` is, as theirs has its matrices the other way.

    The view then has theirs' elements in theirs' order, though perhaps more axes: reading is
    `view.copy_(theirs.reshape(view.shape))` and writing is `view.reshape(piece.shape)`. At most one tensor of
    theirs is copied at a time. A tensor without axes is its own view.

    Args:
        theirs: Its name in the file. Packed weights lie under this name with a suffix (`_blocks`, `_scales`, ...).
        ours: Our tensor.
        expert: Matrix of our stack; None means all of ours.
        start: First row of the part.
        stop: One after the last.
        axis: Which axis of `ours[expert]` (or of `ours`) these rows are on.
        shape: Theirs' shape in the file, unpacked.
        transposed: Their matrices are ours transposed.
        interleaved: Their gate and up rows alternate.
    """

    theirs: str
    ours: str
    expert: int | None
    start: int
    stop: int
    axis: int
    shape: tuple[int, ...]
    transposed: bool = False
    interleaved: bool = False


class FamilyChoice(NamedTuple):
    """The family that a model is written as, and why."""

    family: Family
    reason: str


@dataclass(frozen=True)
class Stored:
    """How one of our tensors lies in their files.

    Args:
        names: Theirs that make it up, in the order of our rows. With `{e}` there is one for each expert;
            without, a stack of experts is in one tensor of three axes.
        transposed: See `Piece`.
        interleaved: See `Piece`.
        folded: Their first two axes are one: (E F, D) for our (E, F, D).
        row: They have a leading axis of 1.
    """

    names: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    folded: bool = False
    row: bool = False


@dataclass(frozen=True)
class Rule:
    """A translation that takes several keys or several options.

    Args:
        keys: The keys it reads; it alone says whether they may be missing.
        read: Our options by dotted path, from the file's values.
        write: Its keys, from a config.
    """

    keys: tuple[str, ...]
    read: Callable[[Values, Match], Mapping[str, Any]]
    write: Callable[[ModelConfig], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One family.

    Args:
        model_type: Its name in `config.json`.
        architecture: Its class in transformers; a model server picks its code by it.
        keys: Key of `config.json` to our option, or to several options that it sets together. A key inside an
            object of `sections` is written with a dot.
        tensors: Our tensor to the ways it may be stored; we write the first.
        rules: What takes more than one key.
        aliases: Other spellings of keys, to the one in `keys`.
        defaults: Values of keys that files leave out or set to null; every other key of `keys` must be there. A
            value that begins with "=" is that of another key.
        absent: Values of keys that files leave out, where null means something else.
        fixed: Our options that this family fixes at something else than their default.
        constants: Keys with one possible value, which are written because programs look at them.
        allowed: Keys with which the family would be another one: the values that may be read.
        ignored: Further keys without effect.
        needs: What else must hold for a config to be of this family, by what to call it.
        sections: Keys whose value is an object with further keys.
        inside: The key whose object holds everything, for the text model of a larger one.
        prefix: What all names of tensors begin with.
        ignored_tensors: Theirs that hold nothing learnt: a name begins so.
        read_only: Never chosen to write a model.
        whole: The one key that holds all our options as they are; tensors have our names then.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str | tuple[str, ...]]
    tensors: Mapping[str, tuple[Stored, ...]]
    rules: tuple[Rule, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    needs: Mapping[str, Callable[[ModelConfig], bool]] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    inside: str = ""
    prefix: str = ""
    ignored_tensors: tuple[str, ...] = ()
    read_only: bool = False
    whole: str = ""

    def read(self, values: Mapping[str, Any], match: Match = "original") -> ModelConfig:
        """The `ModelConfig` that a `config.json` of this family describes.

        Args:
            values: What the file says.
            match: What to compute where transformers departs from the model's authors: as the authors did
                ("original"), or as transformers does ("hf").

        Raises:
            FormatError: a key is missing, unknown, or asks for what this program does not do.
            ConfigError: the values cannot describe a model.
        """
        if self.whole:
            if not isinstance(values.get(self.whole), dict):
                raise FormatError(f"config.json lacks {self.whole}, the options of the model")
            return from_dict(ModelConfig, values[self.whole])
        said = self._said(values)
        noted = said.pop("moiety", None) or {}
        known = Values(said, self.model_type, self.defaults, self.absent)
        known.layers()
        options: dict[str, Any] = dict(self.fixed)
        for key, paths in self.keys.items():
            value = known.activation(key) if key.endswith("hidden_act") else known[key]
            for path in (paths,) if isinstance(paths, str) else paths:
                options[path] = tuple(value) if isinstance(value, list) else value
        for rule in self.rules:
            options |= rule.read(known, match)
        if options.get("attention.head_dim") is None:
            options["attention.head_dim"] = known.head_dim(options)
        config = _build(options)
        if not isinstance(noted, dict):
            raise FormatError(f"config.json has moiety {noted!r}; an object with options is wanted")
        whole = _build({**flatten(config), **noted}) if noted else config
        wrong = _differences(whole, config)
        if wrong:
            raise FormatError(f"config.json notes {wrong} for moiety, which its own keys decide")
        return whole

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The `config.json` of a model; only exact where `family_for` says so."""
        written: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        if self.whole:
            return {**written, self.whole: to_dict(config)}
        written |= self._write_keys(config)
        found, wanted = flatten(self.read(written)), flatten(config)
        noted = {path: value for path, value in wanted.items() if found.get(path) != value}
        return {**written, "moiety": noted} if noted else written

    def cannot_say(self, config: ModelConfig) -> list[str]:
        """Options of `config` that this family's `config.json` cannot express; empty if it is exact."""
        if self.whole:
            return []
        if (config.moe is not None) != any(path.startswith("moe.") for path in self._paths()):
            return ["moe"]
        if (config.attention.mla is not None) != any(rule.keys[0] == "kv_lora_rank" for rule in self.rules):
            return ["attention.mla"]
        unmet = [name for name, holds in self.needs.items() if not holds(config)]
        if unmet:
            return unmet
        try:
            return _differences(
                config, self.read({"model_type": self.model_type, **self._write_keys(config)})
            )
        except (ConfigError, FormatError):
            return ["a value out of this family's range"]

    def pieces(
        self,
        config: ModelConfig,
        shapes: Shapes,
        stored: Container[str] | None = None,
        *,
        in_memory: bool = False,
    ) -> Iterator[Piece]:
        """Where the family's tensors lie in ours, tensor by tensor in the order of `shapes`.

        Args:
            config: The model's.
            shapes: Our tensors' names and shapes.
            stored: Names in the files to read, to recognise other layouts of the same tensors; None gives the
                layout that we write.
            in_memory: Names and layout of the family's modules in transformers instead.
        """
        for ours, shape in shapes.items():
            layer = re.search(r"(?<=blocks\.)\d+", ours)
            number = layer[0] if layer else ""
            pattern = re.sub(r"(?<=blocks\.)\d+", "{l}", ours)
            ways = (Stored((ours,)),) if self.whole else self.tensors.get(pattern, ())
            assert ways, (self.model_type, ours)
            way = ways[-1 if in_memory else 0]
            for other in ways[1:]:
                first, wanted = (self._name(one.names[0], number, 0) for one in (other, way))
                if stored is not None and wanted not in stored and first in stored:
                    way = other
            stacked = not self.whole and ".experts." in pattern
            yield from self._pieces_of(ours, tuple(shape), config, way, number, stacked)

    def ignored_names(self, names: Iterable[str], config: ModelConfig) -> set[str]:
        """Those of `names` in a file that hold nothing of this model: rotary tables, multi-token prediction.

        A layer after the last is one for multi-token prediction only if it has the projection of those.
        """
        names = set(names)
        found = {name for name in names if name.endswith("rotary_emb.inv_freq") and not self.whole}
        found |= {name for name in names if self.ignored_tensors and name.startswith(self.ignored_tensors)}
        for name in names:
            layer = re.match(re.escape(self.prefix) + r"model\.layers\.(\d{1,6})\.eh_proj\.weight$", name)
            if layer is not None and int(layer[1]) >= config.layers:
                begin = name.removesuffix("eh_proj.weight")
                found |= {other for other in names if other.startswith(begin)}
        return found

    @property
    def head(self) -> str:
        """Their name of the output head."""
        ways = self.tensors.get("head.weight", (Stored(("head.weight",)),))
        return self.prefix + ways[0].names[0]

    def _name(self, name: str, layer: str, expert: int | None) -> str:
        return self.prefix + name.replace("{l}", layer).replace("{e}", str(expert))

    def _pieces_of(
        self, ours: str, shape: tuple[int, ...], config: ModelConfig, way: Stored, layer: str, stacked: bool
    ) -> Iterator[Piece]:
        """The pieces of one of our tensors, stored in one way."""
        if not shape:
            yield Piece(self._name(way.names[0], layer, None), ours, None, 0, 1, 0, ())
            return
        one_by_one = "{e}" in way.names[0]
        part = shape[1:] if one_by_one else shape
        axis = 1 if stacked and not one_by_one else 0
        bounds = _rows(config, part[axis], len(way.names))
        for expert in range(shape[0]) if one_by_one else (None,):
            for name, start, stop in zip(way.names, bounds, bounds[1:], strict=False):
                theirs = [*part[:axis], stop - start, *part[axis + 1 :]]
                if way.transposed:
                    theirs.insert(axis, theirs.pop())
                if way.folded:
                    theirs[:2] = [theirs[0] * theirs[1]]
                if way.row:
                    theirs.insert(0, 1)
                full = self._name(name, layer, expert)
                flags = (way.transposed, way.interleaved)
                yield Piece(full, ours, expert, start, stop, axis, tuple(theirs), *flags)

    def _paths(self) -> Iterator[str]:
        yield from self.fixed
        for paths in self.keys.values():
            yield from (paths,) if isinstance(paths, str) else paths

    def _said(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same values under the spellings of `keys`, every one of them known and allowed."""
        if self.inside:
            values = self._unwrapped(values)
        said: dict[str, Any] = {}
        for spelling, value in self._spelled(values):
            key = self.aliases.get(spelling, spelling)
            if key in said and said[key] != value:
                raise FormatError(f"config.json says {key} twice: {said[key]!r} and {value!r}")
            said[key] = value
        known = {*self.keys, *self.constants, *self.allowed, *self.ignored, *WITHOUT_EFFECT, "moiety"}
        known.update(*(rule.keys for rule in self.rules))
        unknown = sorted(key for key in said if key not in known and said[key] is not None)
        unknown = [key for key in unknown if key.rpartition(".")[2] not in WITHOUT_EFFECT]
        if unknown:
            raise FormatError(
                f"config.json has {', '.join(unknown)}, unknown for model_type {self.model_type!r}",
                hint="it may change what the model computes; where it surely does not, remove it from the file",
            )
        for key, may in {**self.allowed, **{key: (value,) for key, value in self.constants.items()}}.items():
            given = said.get(key)
            if given is not None and not _all_in(given, may):
                raise FormatError(
                    f"config.json has {key} {given!r}; allowed is {', '.join(map(repr, may))}",
                    hint="this program does not compute such a model",
                )
        return said

    def _unwrapped(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of the text model, with what is said outside of it about the whole."""
        inner = values.get(self.inside)
        if not isinstance(inner, dict):
            raise FormatError(f"config.json lacks {self.inside}, the options of the text model")
        tied = values.get("tie_word_embeddings")
        return {**inner, **({} if tied is None else {"tie_word_embeddings": tied})}

    def _spelled(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Keys and values, those of sections with a dot."""
        for key, value in values.items():
            if key not in self.sections:
                yield key, value
            elif isinstance(value, dict):
                yield from ((f"{key}.{name}", part) for name, part in value.items())
            elif value is not None:
                raise FormatError(f"config.json has {key} {value!r}; an object is wanted")

    def _write_keys(self, config: ModelConfig) -> dict[str, Any]:
        """Every key of the file but the names, with those of sections in their objects."""
        flat = flatten(config)
        spelled: dict[str, Any] = dict(self.constants)
        for key, paths in self.keys.items():
            value = flat.get(paths if isinstance(paths, str) else paths[0])
            if key.endswith("hidden_act"):
                value = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}.get(value or "silu")
            spelled[key] = list(value) if isinstance(value, tuple) else value
        for rule in self.rules:
            spelled |= rule.write(config)
        written: dict[str, Any] = {}
        for key, value in spelled.items():
            section, dot, name = key.partition(".")
            place = written.setdefault(section, {}) if dot else written
            place[name if dot else key] = value
        return written


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Options by dotted path; a part that is missing is None under its own path."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def _build(flat: Mapping[str, Any]) -> ModelConfig:
    """The opposite of `flatten`; options left out take their defaults."""
    top: dict[str, Any] = {}
    for path, value in flat.items():
        *parts, name = path.split(".")
        place = top
        for part in parts:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise FormatError(f"config.json has {path} inside {part}, which is {place!r}")
        place[name] = value
    if isinstance(top.get("moe"), dict):  # the dense width is unused where every layer has experts
        top.setdefault("d_ff", top["moe"].get("d_ff"))
    return from_dict(ModelConfig, top)


def _differences(wanted: ModelConfig, found: ModelConfig) -> list[str]:
    """Options in which two models differ, apart from those that change nothing in what they compute."""
    one, other = _effective(wanted), _effective(found)
    return sorted(path for path in {*one, *other} if one.get(path) != other.get(path))


def _effective(config: ModelConfig) -> dict[str, Any]:
    """Options by path, with one value for all that compute the same."""
    flat = flatten(config)
    attention, moe = config.attention, config.moe
    for name in ("window", "rope"):
        layers = flat[f"attention.{name}_layers"]
        if layers is not None and len(layers) == config.layers:  # no layer is named twice
            flat[f"attention.{name}_layers"] = None
    if attention.window is None or attention.window_layers == ():
        flat |= {"attention.window": None, "attention.window_layers": None, "attention.chunked": False}
    if attention.scale == attention.head_dim**-0.5:
        flat["attention.scale"] = None
    if attention.query_scale == 0 or flat["attention.rope_layers"] is None:
        flat |= {"attention.query_scale": 0.0, "attention.query_scale_floor": 8192}
    if config.norm == "rms":
        flat["norm_bias"] = False
    if moe is None:
        return flat
    for path in TRAINING:
        del flat[path]
    if not config.dense_layers:
        flat |= {"d_ff": None, "activation": None, "gated": None, "feed_forward_bias": None}
    flat["moe.per_layer"] = [one for one in moe.per_layer if one[1:] != (moe.experts, moe.experts_per_token)]
    if moe.groups == 1:
        flat["moe.group_score"] = None
    if moe.activation != "clamped_swiglu":
        flat["moe.activation_limit"] = None
    if moe.router == "sparsemixer":
        said = dict(option.split("=") for option in moe.router_options if option.count("=") == 1)
        flat |= {"moe.renormalize": None, "moe.router_options": {"jitter": "0.01", **said}}
    return flat


def _all_in(value: Any, allowed: tuple[Any, ...]) -> bool:
    """A value is allowed; of a list each of its values."""
    if isinstance(value, list) and value not in allowed:
        return all(_all_in(one, allowed) for one in value)
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _rows(config: ModelConfig, rows: int, parts: int) -> list[int]:
    """Where the parts of a tensor begin and end: one; gate and up; query, key and value."""
    if parts == 3:
        attention = config.attention
        query, one = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        assert rows == query + 2 * one, (rows, query, one)
        return [0, query, query + one, rows]
    assert rows % parts == 0, (rows, parts)
    return [rows // parts * number for number in range(parts + 1)]

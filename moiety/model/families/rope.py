"""Rotary positions in a `config.json`, old spelling (`rope_theta`, `rope_scaling`) and new (`rope_parameters`)."""

from __future__ import annotations

from typing import Any

from moiety.config import ModelConfig, RopeConfig
from moiety.errors import FormatError
from moiety.model.families.base import Match, Rule
from moiety.model.families.values import Values, number, whole

__all__ = ["rope"]

# Keys of every kind, and those that one kind adds.
COMMON = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": (
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
        "short_mscale", "long_mscale",
    ),
}  # fmt: skip
# Hunyuan's alpha comes with keys of other kinds, which nothing reads.
ALPHA = ("alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def rope(
    theta: float = 10_000.0,
    *,
    partial: float | None = None,
    alpha: bool = False,
    scaled: dict[str, Any] | None = None,
    theta_key: str = "",
    rotary_dim: bool = False,
) -> Rule:
    """The rule of one family.

    Args:
        theta: Base where the file says none.
        partial: Part of each head that is rotated where the file does not say it; None where the family
            always rotates all of it.
        alpha: Kind "dynamic" with an `alpha` is the base stretched once for all (Hunyuan).
        scaled: `rope_parameters` where the file has none of any spelling.
        theta_key: Another key that the authors' own code takes the base from.
        rotary_dim: The authors say the rotated part as `rotary_dim`, in dimensions.
    """
    keys = (
        "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_dim",
        "original_max_position_embeddings", *((theta_key,) if theta_key else ()),
    )  # fmt: skip

    def read(values: Values, match: Match) -> dict[str, Any]:
        said = _merged(values)
        if scaled is not None and not {"rope_type", "type"} & said.keys():
            said = {**scaled, **said}
        base = number(said.get("rope_theta", theta), "rope_theta")
        if theta_key and theta_key in values and match == "original":
            base = values.number(theta_key)
        stretched = _kind(said, values, alpha, match)
        options: dict[str, Any] = {"attention.rope_theta": base, "attention.rope": stretched}
        fraction = _fraction(said, values, partial)
        return {**options, "attention.rope_fraction": fraction}

    def write(config: ModelConfig) -> dict[str, Any]:
        attention = config.attention
        stretched = _written(attention.rope)
        parameters = {"rope_theta": attention.rope_theta, **stretched}
        written: dict[str, Any] = {"rope_theta": attention.rope_theta}
        if partial is not None:
            parameters["partial_rotary_factor"] = attention.rope_fraction
            written["partial_rotary_factor"] = attention.rope_fraction
        if attention.rope is not None or partial is not None:
            # what transformers 4 reads; 5 takes it before rope_parameters, hence both are whole
            written["rope_scaling"] = stretched if attention.rope is not None else None
        if theta_key:
            written[theta_key] = attention.rope_theta
        if rotary_dim:
            written["rotary_dim"] = attention.rotary_dim
        return {**written, "rope_parameters": parameters}

    return Rule(keys=keys, read=read, write=write)


def _merged(values: Values) -> dict[str, Any]:
    """All that is said about rotary positions, wherever."""
    said: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = values.get(key, {})
        if not isinstance(part, dict):
            raise FormatError(f"config.json has {key} {part!r}; an object is wanted")
        _add(said, {name: value for name, value in part.items() if value is not None}, key)
    outside = {name: values.get(name) for name in ("rope_theta", "original_max_position_embeddings")}
    if "partial_rotary_factor" not in said:  # transformers heeds the outer one only then
        outside["partial_rotary_factor"] = values.get("partial_rotary_factor")
    _add(said, {name: value for name, value in outside.items() if value is not None}, "its keys")
    return said


def _add(said: dict[str, Any], more: dict[str, Any], where: str) -> None:
    for name, value in more.items():
        if said.setdefault(name, value) != value:
            raise FormatError(
                f"config.json has several values of {name}: {said[name]!r} and in {where} {value!r}"
            )


def _fraction(said: dict[str, Any], values: Values, partial: float | None) -> float:
    """The part of each head that is rotated."""
    if partial is None:
        for name in ("partial_rotary_factor", "rotary_dim"):
            given = said.get(name, values.get(name))
            if given is not None and (name == "rotary_dim" or given != 1):
                raise FormatError(
                    f"config.json has {name} {given!r}; this family rotates the whole of each head",
                    hint="remove the key if that is so",
                )
        return 1.0
    given = said.get("partial_rotary_factor")
    if given is not None:
        return number(given, "partial_rotary_factor")
    rotary_dim = values.get("rotary_dim")
    if rotary_dim is None:
        return partial
    return whole(rotary_dim, "rotary_dim") / max(values.whole("head_dim"), 1)


def _kind(said: dict[str, Any], values: Values, alpha: bool, match: Match) -> RopeConfig | None:
    """How the frequencies are stretched."""
    kinds = {said[name] for name in ("rope_type", "type") if isinstance(said.get(name), str)}
    kind = str(said.get("rope_type", said.get("type", "default")))
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in KINDS or len(kinds) > 1:
        raise FormatError(
            f"config.json has rope_type {kind!r}; allowed is {', '.join(KINDS)}",
            hint="this program does not compute such rotary positions",
        )
    stretched_once = alpha and kind == "dynamic" and bool(said.get("alpha"))
    mine = ALPHA if stretched_once else KINDS[kind]
    stray = sorted(said.keys() - {*COMMON, *mine, "original_max_position_embeddings"})
    if stray:
        raise FormatError(f"config.json has {', '.join(stray)}, unknown for rope_type {kind!r}")
    if kind == "default":
        return None
    if stretched_once:
        return RopeConfig(kind="alpha", factor=number(said["alpha"], "alpha"))
    options: dict[str, Any] = {}
    for name in mine:
        if name in said and name != "original_max_position_embeddings":
            options[name] = _option(name, said[name])
    if "original_max_position_embeddings" in mine:
        original = said.get("original_max_position_embeddings", values["max_position_embeddings"])
        options["original_positions"] = whole(original, "original_max_position_embeddings")
    needed = {"longrope": ("short_factor", "long_factor"), "llama3": mine}.get(kind, ("factor",))
    missing = [name for name in needed if name not in said and name != "original_max_position_embeddings"]
    if missing:
        raise FormatError(f"config.json lacks {', '.join(missing)} of rope_type {kind!r}")
    if kind == "longrope":
        if "factor" not in said:
            options["factor"] = values.whole("max_position_embeddings") / max(
                options["original_positions"], 1
            )
        options["always_short"] = match == "hf" and "short_mscale" in said
    return RopeConfig(kind=kind, **options)  # type: ignore[arg-type]


def _option(name: str, value: Any) -> Any:
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list):
            raise FormatError(f"config.json has {name} {value!r}; a list of numbers is wanted")
        return tuple(number(one, name) for one in value)
    if name == "truncate":
        if not isinstance(value, bool):
            raise FormatError(f"config.json has truncate {value!r}; true or false is wanted")
        return value
    return number(value, name)


def _written(stretched: RopeConfig | None) -> dict[str, Any]:
    """The keys of a kind, without those that are at their default and that no program insists on."""
    if stretched is None:
        return {"rope_type": "default"}
    if stretched.kind == "alpha":
        return {"rope_type": "dynamic", "type": "dynamic", "alpha": stretched.factor, "factor": 1.0}
    plain = RopeConfig(kind=stretched.kind, original_positions=1, short_factor=(1.0,), long_factor=(1.0,))
    written: dict[str, Any] = {"rope_type": stretched.kind, "type": stretched.kind}
    always = (
        "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    )  # fmt: skip
    for name in KINDS[stretched.kind]:
        ours = "original_positions" if name == "original_max_position_embeddings" else name
        value = getattr(stretched, ours)
        if name in always or value != getattr(plain, ours):
            written[name] = list(value) if isinstance(value, tuple) else value
    return written

"""A model's config from whatever names it, without its weights, and what a name such as 8x7B means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from moiety import cost, registry, storage
from moiety.config import Architecture, ModelConfig
from moiety.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from moiety.plan.weights import Stored

__all__ = ["config_named", "stored_named", "why_so_many"]

SWITCH = "switch_transformers"


def config_named(name: str) -> Architecture:
    """The config of a folder, a `config.json`, a GGUF file, a name of the registry, or a model of the hub.

    Raises:
        ConfigError: nothing has that name, or it is known and cannot be described.
        FormatError: a file that is not what it claims to be.
        StorageError: the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return _from_json(storage.inside(path, "config.json"))
    if path.suffix == ".gguf" and path.exists():
        from moiety.model.gguf import load_config

        return load_config(path)
    if path.suffix == ".json" and path.exists():
        return _from_json(path)
    hub_names = {entry.source.split(",")[0].lower(): known for known, entry in registry.REGISTRY.items()}
    if name.lower() in hub_names:
        return registry.lookup(hub_names[name.lower()])
    from moiety.model import hub

    if hub.is_hub_name(name):
        return _from_json(hub.resolve(name, weights=False) / "config.json")
    return registry.lookup(name)


def _from_json(file: Path) -> Architecture:
    """What a config.json says, with the file's name in every error."""
    from moiety.model.families import family_of
    from moiety.model.switch_files import read_config

    values = storage.read_json(file)
    plain = {key: value for key, value in values.items() if key != "quantization_config"}
    try:
        return read_config(plain) if plain.get("model_type") == SWITCH else family_of(plain).read(plain)
    except (FormatError, ConfigError) as error:
        raise type(error)(f"{file}: {error.message}", hint=error.hint) from error


def why_so_many(name: str, config: Architecture) -> str:
    """Why a model called NxM has not N times M parameters; empty for any other model."""
    found = re.search(r"(?<![\d.])(\d+)x(\d+(?:\.\d+)?)b(?![a-z])", Path(name).name.lower())
    moe = config.moe
    if found is None or moe is None or int(found[1]) != moe.experts or moe.per_layer:
        return ""
    counts = cost.parameters(config)
    experts = counts.components["routed_experts"]
    used = counts.active_components["routed_experts"]
    once = counts.total - experts
    size = float(found[2])
    return (
        f"Why {found[1]} x {found[2]}B is not {int(found[1]) * size:g}B: the name counts {found[1]} whole models of "
        f"{found[2]}B, but only the feed-forward part of a layer is there {found[1]} times. The experts have "
        f"{_billions(experts)}; attention, embeddings, routers and norms are there once, {_billions(once)}. Together "
        f"{_billions(counts.total)}. A token goes through {moe.experts_per_token} of the {moe.experts} experts of each "
        f"layer, {_billions(used)}, and through all that is there once: {_billions(counts.active)} are active. All of "
        f"them must be in memory, because the next token may choose any expert."
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B"


def stored_named(name: str, config: Architecture) -> Stored | None:
    """What a folder or a file holds, if it holds weights."""

    from moiety.plan.weights import read_stored

    path = Path(name)
    there = path.suffix == ".gguf" and path.is_file()
    there = there or (path.is_dir() and any(path.glob("*.safetensors")))
    return read_stored(path, config) if there and isinstance(config, ModelConfig) else None

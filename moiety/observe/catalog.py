"""What there is to choose from: routers, what goes around them, and losses, each with its own words."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from moiety.moe import losses
from moiety.moe.routers import AROUND, ROUTERS, RouterKind
from moiety.moe.soft import SoftMoE

__all__ = ["loss_entries", "router_entries"]

LOSSES = {
    "load": "load_balance_loss", "sequence": "sequence_balance_loss", "gshard": "gshard_balance_loss",
    "importance": "importance_loss", "smooth_load": "smooth_load_loss", "group": "group_balance_loss",
    "communication": "communication_loss", "entropy": "entropy_loss", "sparsity": "sparsity_loss", "z": "z_loss",
}  # fmt: skip
FLAGS = {
    "tempered": "--temperature, or --router-temperature for a schedule",
    "explore": "--explore, --router-warmup",
    "soft_to_sparse": "--soft-steps",
    "expert_dropout": "--expert-dropout",
    "straight_through": "--router-gradient straight_through",
    "dense_mixer": "--router-gradient dense",
}


def router_entries() -> list[dict[str, Any]]:
    """Every router, everything that goes around one, and the layers that need none.

    Returns:
        Of each: name, kind (router, around or layer), summary, paper (arXiv id), causal, experts_per_token (a
        number, "k" where the model says, "varies", "as inside" or "all"), options (its own, with their defaults),
        config (options of the model that it obeys), flags (how `moiety train` is told) and text (its class's
        words).
    """
    found = [_entry(name, kind, "router") for name, kind in ROUTERS.items()]
    found += [_entry(name, kind, "around") for name, kind in AROUND.items()]
    soft = {"name": "soft_moe", "kind": "layer", "paper": "2308.00951", "causal": False}
    soft["summary"] = "no choice: experts work on mixtures of tokens; for encoders"
    soft |= {
        "experts_per_token": "all",
        "options": {},
        "config": [],
        "flags": "",
        "text": inspect.getdoc(SoftMoE),
    }
    return [*found, soft]


def _entry(name: str, kind: RouterKind, what: str) -> dict[str, Any]:
    taken = {} if what == "around" else kind.taken
    fields = [item for item in dataclasses.fields(kind.router) if item.name not in (*taken, "router")]
    options = {item.name: None if item.default is dataclasses.MISSING else item.default for item in fields}
    by_option = "k" if "experts_per_token" in taken.values() else "varies"
    return {
        "name": name,
        "kind": what,
        "summary": kind.summary,
        "paper": kind.paper,
        "causal": kind.causal,
        "experts_per_token": "as inside" if what == "around" else kind.fixed_k or by_option,
        "options": options,
        "config": ["group_score" if option == "group_best" else option for option in taken.values()],
        "flags": FLAGS.get(name, ""),
        "text": inspect.getdoc(kind.router),
    }


def loss_entries() -> list[dict[str, Any]]:
    """Every loss of a routing: name, kind "loss", and what it is in a sentence."""
    texts = {name: inspect.getdoc(getattr(losses, function)) or "" for name, function in LOSSES.items()}
    return [{"name": name, "kind": "loss", "summary": text.splitlines()[0]} for name, text in texts.items()]

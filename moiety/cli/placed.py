"""`moiety plan --ranks`: which rank holds which expert, what that sends and keeps, and whether it pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moiety.cli import planned
from moiety.cli.named import config_named, stored_named
from moiety.cli.output import print_json, print_table, talk
from moiety.cli.planned import band, say
from moiety.config import ModelConfig
from moiety.errors import UsageError
from moiety.parallel.worth import Comparison, Way, compare
from moiety.plan.hardware import device_named
from moiety.plan.links import Cluster
from moiety.plan.options import PlanOptions
from moiety.plan.plan import here
from moiety.plan.replay import ReplayOptions
from moiety.plan.search import short_bytes
from moiety.plan.weights import Stored, stored_as

__all__ = ["after", "placed", "run", "show"]


def placed(
    config: ModelConfig, stored: Stored | None, wanted: PlanOptions, profile: Any, *, trace: str = ""
) -> Comparison:
    """The comparison for a model, a device and maybe a trace file.

    Args:
        config: The model's.
        stored: Its weights; None takes the wanted format, or bfloat16.
        wanted: Ranks, nodes, slots and the device.
        profile: Of this machine, for device cpu.
        trace: A file, or "" for uniform loads.
    """
    from moiety import tracefile

    device = here(profile) if wanted.device == "cpu" else device_named(wanted.device)
    cluster = Cluster(device=device, ranks=wanted.ranks, nodes=wanted.nodes)
    layers = config.moe_layers
    count = sum(config.moe.at(layer).stored for layer in layers) if config.moe is not None else 0
    return compare(
        config,
        cluster,
        [(stored or stored_as(config, wanted.format or "bf16")).expert_bytes / max(count, 1)] * len(layers),
        trace=tracefile.read(trace) if trace else None,
        redundant=wanted.redundant,
        mode=wanted.placement,
        node_limit=wanted.node_limit,
    )


def run(
    name: str,
    replayed: ReplayOptions,
    wanted: PlanOptions,
    profile: Any,
    *,
    json: bool = False,
    plot: str = "",
) -> int:
    """Place a model's experts by a recorded trace, and print it; as JSON, or as a page too."""
    if not name or replayed.policies or replayed.budgets or wanted.train_tokens:
        raise UsageError(
            "--ranks with --trace places a model's experts: it wants a model, and no policies, budgets or training",
            hint="moiety plan olmoe-1b-7b --ranks 8 --nodes 2 --trace FILE",
        )
    config = config_named(name)
    if not isinstance(config, ModelConfig):
        raise UsageError(f"{name} is an encoder-decoder: its experts are not placed")
    stored = None if wanted.format else stored_named(name, config)
    found = placed(config, stored, wanted, profile, trace=replayed.trace)
    if plot:
        from moiety.observe.plan_page import write_placement_page

        write_placement_page(Path(plot), name, found)
        talk().print(f"{plot} is written")
    if json:
        print_json({"name": name, **found.values()})
    else:
        show(found)
    return 0


def after(
    plan: dict[str, Any], config: ModelConfig, stored: Any, wanted: PlanOptions, profile: Any, *, json: bool
) -> int:
    """Print a plan, and after it where experts go if routing is uniform."""
    found = placed(config, stored, wanted, profile)
    if json:
        print_json(plan | {"placement": found.values()})
    else:
        planned.show(plan, wanted)
        show(found)
    return 0


def show(found: Comparison) -> None:
    """Advice first, then what there is to choose from, then bytes on links."""
    say(found.advice)
    for note in found.notes:
        say(note)
    rows = [[way.name, *_figures(way, found.layers)] for way in found.ways]
    heads = ["experts", "busiest", "worst layer", "a rank", "to move", "s for 1M tokens"]
    print_table("busiest rank over the mean, experts held and moved", heads, rows)
    sent = [
        [way.name, f"once per {once}", short_bytes(size.inside), short_bytes(size.between)]
        for way in found.ways
        for once, size in way.token_bytes.items()
    ]
    sent += [
        [
            way.name,
            "within limit",
            short_bytes(way.limited_bytes.inside),
            short_bytes(way.limited_bytes.between),
        ]
        for way in found.ways
        if way.limited_bytes is not None
    ]
    print_table("on links for a token, out and back", ["experts", "a row", "in a node", "between"], sent)


def _figures(way: Way, layers: tuple[int, ...]) -> list[str]:
    worst = max(way.layer_imbalance)
    moving = f"{short_bytes(sum(way.moved))}, {way.move_seconds.middle:.2g} s" if sum(way.moved) else "-"
    layer = f"{worst:.2f} ({layers[way.layer_imbalance.index(worst)]})"
    return [f"{way.imbalance:.2f}", layer, short_bytes(way.rank_bytes), moving, band(way.seconds._asdict())]

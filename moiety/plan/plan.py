"""A whole plan: one model, one device, the options, as plain values to print, plot or write as JSON. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from moiety import cost
from moiety.config import Architecture, ModelConfig, require
from moiety.fields import size_bytes
from moiety.plan import estimate, search, speed
from moiety.plan.hardware import API_PRICES, DEVICES, KINDS, Band, Device, Sourced, device_named
from moiety.plan.links import ONCE, Cluster, exchange, sent
from moiety.plan.options import PlanOptions, count_named
from moiety.plan.profile import ROWS, Profile
from moiety.plan.speed import Machine, Setting
from moiety.plan.weights import Stored, gigabytes, stored_as

__all__ = ["UNMEASURED", "here", "make_plan"]

UNMEASURED = "not measured: two channels of DDR4 are assumed; `moiety plan --measure` measures this machine"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def here(profile: Profile | None) -> Device:
    """This machine as a device: by its profile, or by assumption but for its memory."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    assumed = DEVICES["laptop-16"]
    rate = assumed.bandwidth if profile is None else profile.best_read_rate.high
    return Device(
        name="cpu",
        kind="desktop",
        memory_bytes=memory if profile is None else float(profile.memory_bytes),
        bandwidth=rate,
        flops=assumed.flops if profile is None else _flops(profile),
        link=assumed.link,
        host_link=rate,
        source=UNMEASURED if profile is None else f"measured here, {profile.threads} threads",
        date=assumed.date if profile is None else profile.measured,
    )


def _flops(profile: Profile) -> Mapping[str, float]:
    """Operations per second that the kernels reached with many rows."""
    best = {form: 2 * ROWS[-1] / rows[str(ROWS[-1])][1] for form, rows in profile.experts.items()}
    top = max(best.values())
    return {"fp32": best.get("fp32", top), "bf16": top, "fp8": top}


def _machine(options: PlanOptions, profile: Profile | None) -> Machine:
    is_here = options.device == "cpu"
    require(
        not is_here or options.devices == 1,
        f"devices is {options.devices}, but device cpu is this one machine",
        "name a device: --device server-ddr5 for instance",
    )
    rate = float(size_bytes(options.disk_rate, "disk_rate")) if options.disk_rate else 0.0
    return Machine(
        device=here(profile) if is_here else device_named(options.device),
        count=options.devices,
        profile=profile if is_here else None,
        disk=Band(rate, rate) if rate else None,
    )


def _choices(
    config: ModelConfig, options: PlanOptions, stored: Stored | None, machine: Machine
) -> list[Stored]:
    """The weights that are compared: as asked for, as stored, or in several formats."""
    if options.format:
        return [stored_as(config, options.format)]
    if stored is not None:
        return [stored]
    return [stored_as(config, form) for form in search.FORMATS]


def make_plan(
    name: str,
    config: Architecture,
    options: PlanOptions,
    *,
    profile: Profile | None = None,
    stored: Stored | None = None,
    other: Architecture | None = None,
) -> dict[str, Any]:
    """Everything that can be said before a run, as plain values; bands are {"low", "high"}.

    Args:
        name: As the user says.
        config: The model's.
        options: What for.
        profile: Of this machine, for device cpu.
        stored: What lies in the model's folder, if it is one.
        other: The model of `options.against`.

    Raises:
        ConfigError: no such device or format, or options that do not go together.
    """
    machine = _machine(options, profile)
    result: dict[str, Any] = {"name": name, **_counts(config), "device": _device(machine)}
    result["weight_gigabytes"] = {form: round(size, 3) for form, size in gigabytes(config).items()}
    result["weight_gibibytes"] = {
        form: round(size * 1e9 / 2**30, 3) for form, size in gigabytes(config).items()
    }
    result["devices_for_weights"] = {
        form: estimate.devices_needed(size * 1e9, machine.device, usable=False)
        for form, size in gigabytes(config).items()
    }
    result["api_prices"] = [one._asdict() for one in API_PRICES]
    result["warnings"] = []
    if not isinstance(config, ModelConfig):
        result["advice"] = "an encoder-decoder: its weights are counted, its speed is not planned"
        return result
    require(
        options.context <= config.max_positions,
        f"context is {options.context}; the model has {config.max_positions} positions",
    )
    choices = _choices(config, options, stored, machine)
    result |= _serving(name, config, options, machine, choices)
    result |= _always(config, options)
    if options.train_tokens:
        result["training"] = _training(config, options, machine)
    if options.capacity_factor:
        result["capacity"] = estimate.capacity(config, options.prompt, options.capacity_factor)
    if options.ranks > 1:
        result["communication"] = _links(config, options, machine)
    if isinstance(other, ModelConfig):
        result["against"] = {
            "name": options.against,
            **estimate.savings(config, other, batch=options.batch),
        }
    return result


def _counts(config: Architecture) -> dict[str, Any]:
    counts = cost.parameters(config)
    fields = ("total", "active", "active_without_input_embedding", "active_without_embeddings")
    experts = counts.components["routed_experts"]
    return {
        "parameters": {name: getattr(counts, name) for name in fields}
        | {
            "active_percent": round(100 * counts.active / counts.total, 3),
            "active_percent_of_experts": round(100 * counts.active_components["routed_experts"] / experts, 3)
            if experts
            else None,
            "components": dict(counts.components),
            "active_components": dict(counts.active_components),
        }
    }


def _device(machine: Machine) -> dict[str, Any]:
    device, kind = machine.device, KINDS[machine.device.kind]
    plain = asdict(device) | {"count": machine.count, "measured": machine.profile is not None}
    return plain | {
        "flops": dict(device.flops),
        "shares_reached": {**asdict(kind)},
        "price": _sourced(device.price),
    }


def _sourced(price: Sourced | None) -> dict[str, Any] | None:
    return None if price is None else {**price.band._asdict(), "source": price.source, "date": price.date}


def _serving(
    name: str, config: ModelConfig, options: PlanOptions, machine: Machine, choices: Sequence[Stored]
) -> dict[str, Any]:
    """Memory, layouts, speed, cost and what other programs are told."""
    device, kind = machine.device, KINDS[machine.device.kind]
    ours = options.device == "cpu"
    there = device.memory_bytes * machine.count
    budget = size_bytes(options.memory, "memory") if options.memory else round(kind.usable * there)
    require(
        ours or budget <= there,  # a machine like this one may have more
        f"memory is {search.short_bytes(budget)}; {machine.count} x {device.name} has {search.short_bytes(there)}",
        "leave --memory out, or raise --devices",
    )
    kv_dtypes = (options.kv_dtype,) if options.kv_dtype else ("bf16",)
    setting = Setting(batch=options.batch, context=options.prompt, hit_rate=options.hit_rate)
    found = search.layouts(
        config, choices, machine, setting, budget, kv_dtypes=kv_dtypes, context=options.context, ours=ours
    )
    result: dict[str, Any] = {
        "advice": search.advice(found, budget),
        "memory_budget_bytes": budget,
        "layouts": [_layout(config, one, machine, options) for one in found],
        "devices_needed": {
            one.stored.form: estimate.devices_needed(
                estimate.memory(
                    config,
                    one.stored,
                    device,
                    context=options.context,
                    batch=options.batch,
                    kv_dtype=one.setting.kv_dtype,
                    ours=ours,
                    profile=machine.profile,
                ).total,
                device,
            )
            for one in found
        },
        "fits_when_resident": {
            listed.name: _fitting(config, found[-1].stored, listed, options) for listed in DEVICES.values()
        },
    }
    chosen = search.best(found)
    result["chosen"] = None if chosen is None else found.index(chosen)
    shown = chosen or min(found, key=lambda one: one.memory.total)
    result["flags"] = search.flags(
        config, shown, machine, name=name, context=options.context, devices=options.devices
    )
    result["batches"] = _batches(config, shown, machine, options)
    result["read_nine_tenths_of_experts_from_batch"] = speed.read_share_limit(config)
    result["roofline_tokens_per_s"] = speed.roofline(config, shown.stored, machine, shown.setting)
    result["cost"] = _cost(options, machine, shown)
    result["warnings"] = _warnings(options, machine, shown, result["roofline_tokens_per_s"])
    return result


def _layout(
    config: ModelConfig, one: search.Layout, machine: Machine, options: PlanOptions
) -> dict[str, Any]:
    prompt = speed.prefill(config, one.stored, machine, one.setting, options.prompt) if one.fits else None
    return {
        "format": one.stored.form,
        "bits_per_weight": round(one.stored.bits_per_weight, 3),
        "kv_dtype": one.setting.kv_dtype,
        "fits": one.fits,
        "resident": round(one.setting.resident, 4),
        "hit_rate": round(one.setting.hits, 4),
        "below_cycle": one.below_cycle,
        "memory": asdict(one.memory) | {"total": one.memory.total},
        "decode": _speed(one.decode),
        "prefill": _speed(prompt),
    }


def _speed(one: speed.Speed | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "tokens_per_s": one.tokens_per_s._asdict(),
        "seconds": one.seconds._asdict(),
        "limit": one.limit,
        "read_bytes": round(one.read_bytes),
        "missed_bytes": round(one.missed_bytes),
    }


def _fitting(config: ModelConfig, stored: Stored, device: Device, options: PlanOptions) -> int:
    needed = estimate.memory(config, stored, device, context=options.context, batch=options.batch)
    return estimate.devices_needed(needed.total, device)


def _batches(
    config: ModelConfig, shown: search.Layout, machine: Machine, options: PlanOptions
) -> list[dict[str, Any]]:
    """What more sequences bring: distinct experts, tokens per second of all, and what limits them."""
    rows = []
    for batch in BATCHES:
        setting = Setting(
            batch=batch,
            context=options.prompt,
            kv_dtype=shown.setting.kv_dtype,
            resident=shown.setting.resident,
            hit_rate=options.hit_rate,
        )
        found = speed.decode(config, shown.stored, machine, setting)
        experts = cost.distinct_experts(config, batch) if config.moe is not None else 0.0
        rows.append({"batch": batch, "distinct_experts": round(experts, 2), "limit": found.limit})
        rows[-1]["tokens_per_s"] = found.tokens_per_s._asdict()
    return rows


def _cost(options: PlanOptions, machine: Machine, shown: search.Layout) -> dict[str, Any] | None:
    """Dollars for a million tokens drawn, at the planned speed and at the claimed one."""
    listed = machine.device.price
    if not options.price and listed is None:
        return None
    price = Band(options.price, options.price) if options.price else listed.band if listed else Band(0, 0)
    hourly = Band(price.low * machine.count, price.high * machine.count)
    result: dict[str, Any] = {"dollars_per_hour": hourly._asdict()}
    result["source"] = "given" if options.price else f"{listed.source}, {listed.date}" if listed else ""
    if shown.decode is not None:
        speeds = shown.decode.tokens_per_s
        result["dollars_per_million_tokens"] = {
            "low": hourly.low / speeds.high / 3600 * 1e6,
            "high": hourly.high / speeds.low / 3600 * 1e6,
        }
    if options.tokens_per_s:
        result["claimed_dollars_per_token"] = hourly.high / options.tokens_per_s / 3600
    return result


def _warnings(options: PlanOptions, machine: Machine, shown: search.Layout, roofline: float) -> list[str]:
    found = []
    if not shown.fits:
        needed = estimate.devices_needed(shown.memory.total, machine.device)
        found.append(
            f"{shown.stored.form} does not fit in the memory of {machine.count} x {machine.device.name}: "
            f"{needed} hold it"
        )
    there = machine.device.memory_bytes * machine.count
    if options.memory and size_bytes(options.memory, "memory") > there:
        found.append(
            f"this machine has {search.short_bytes(there)}: the plan is for one like it that has more"
        )
    if options.tokens_per_s > roofline:
        found.append(
            f"{options.tokens_per_s:g} tokens/s is above the roofline, {roofline:.1f} tokens/s: reading a step's "
            f"weights alone takes longer ({shown.stored.form}, batch {options.batch})"
        )
    return found


def _always(config: ModelConfig, options: PlanOptions) -> dict[str, Any]:
    """What needs no device."""
    flops, prompt = (
        cost.flops_per_token(config, options.prompt),
        cost.flops_per_token(config, (options.prompt + 1) // 2),
    )
    once = estimate.activations(
        config, max(min(estimate.STEP_TOKENS, options.prompt), options.batch), options.batch
    )
    return {
        "flops": {
            "per_token": flops.total,
            "per_token_without_scores": cost.flops_per_token(config).total,
            "prompt": options.prompt * prompt.total,
            "multiplications_of_prompt_by_active": options.prompt * cost.parameters(config).active,
            "components": dict(flops.components),
        },
        "kv_bytes_per_token": cost.kv_bytes_per_token(config),
        "kv_bytes": estimate.kv_bytes(
            config, options.context, options.kv_dtype or "bf16", batch=options.batch
        ),
        "activations": once,
        "router": estimate.router_share(config),
        "dense_equivalents": estimate.dense_equivalents(config),
    }


def _training(config: ModelConfig, options: PlanOptions, machine: Machine) -> dict[str, Any]:
    tokens = count_named(options.train_tokens, "train_tokens")
    count = max(machine.count, options.ranks)
    machine = replace(machine, count=count)
    step = count_named(options.train_step, "train_step") if options.train_step else 0.0
    step = step or 4.0 * options.train_context * count
    cluster = Cluster(device=machine.device, ranks=options.ranks, nodes=options.nodes)
    spread = {"spread": cluster} if options.ranks > 1 else {}
    if options.nodes > 1:
        spread["inside_nodes"] = cluster.one_node
    found = {
        name: speed.training(config, machine, tokens, options.train_context, cluster=one, step_tokens=step)
        for name, one in ({"alone": None} | spread).items()
    }
    chosen = found["spread" if spread else "alone"]
    price = machine.device.price.band if machine.device.price else Band(0, 0)
    price = Band(options.price, options.price) if options.price else price
    sizes = estimate.training_memory(config, options.batch * options.train_context)
    result: dict[str, Any] = {name: band._asdict() for name, band in chosen.items()}
    hours = chosen["device_hours"]
    result["memory"] = sizes | {"total": sum(sizes.values())}
    result["devices_for_memory"] = estimate.devices_needed(sum(sizes.values()), machine.device)
    result["dollars"] = (
        {"low": hours.low * price.low, "high": hours.high * price.high} if price.high else None
    )
    result |= {"tokens": tokens, "devices": count, "step_tokens": step, "steps": tokens / step}
    result["shares_reached"] = speed.TRAINING_SHARE._asdict()
    if "inside_nodes" in found:
        result["inside_nodes"] = {name: band._asdict() for name, band in found["inside_nodes"].items()}
    return result


def _links(config: ModelConfig, options: PlanOptions, machine: Machine) -> dict[str, Any]:
    """Bytes of a prompt on the links, by how often a row is sent, and how long its all-to-alls take."""
    tokens = options.prompt * options.batch
    cluster = Cluster(device=machine.device, ranks=options.ranks, nodes=options.nodes)
    row = 2 * 2 * config.d_model * tokens  # bfloat16, out and back
    found = {once: sent(config, cluster, once).times(row) for once in ONCE}
    rank_bytes = found["node"].times(1 / options.ranks)
    seconds = exchange(cluster, rank_bytes, 2 * len(config.moe_layers))
    return estimate.communication(config, tokens, options.ranks) | {
        "links": {once: size._asdict() for once, size in found.items()},
        "seconds": seconds._asdict(),
        "link_bytes_per_s": machine.device.link,
        "network_bytes_per_s": machine.device.network,
    }

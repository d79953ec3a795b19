"""How a plan and a profile are printed: advice first, then short tables that also fit a narrow terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from moiety.cli.output import print_table, short
from moiety.plan.options import PlanOptions
from moiety.plan.profile import Figure, Profile
from moiety.plan.search import short_bytes

__all__ = ["band", "show", "show_profile"]

Values = Mapping[str, Any]


def say(text: str) -> None:
    """A paragraph, as wide as the terminal."""
    print(textwrap.fill(text, shutil.get_terminal_size().columns, break_on_hyphens=False))


def band(found: Values | None, scale: float = 1) -> str:
    """Two figures with a dash, or a sign for none."""
    if found is None:
        return "-"
    return f"{short(scale * found['low'])} to {short(scale * found['high'])}"


def show(found: Values, wanted: PlanOptions) -> None:
    """Everything that was asked for; what has an option of its own is shown where that is given."""
    say(found["advice"])
    for line in found["warnings"]:
        say(f"warning: {line}")
    device = found["device"]
    say(f"{device['count']} x {device['name']}: {device['source']} ({device['date']})")
    counts = found["parameters"]
    say(
        f"{found['name']}: {short(counts['total'])} parameters, {short(counts['active'])} active for a token "
        f"({counts['active_percent']:.2f} %); {short(counts['active_without_input_embedding'])} without the input "
        f"embedding, {short(counts['active_without_embeddings'])} without both"
    )
    _weights(found)
    if "layouts" not in found:
        return
    _layouts(found)
    _memory(found)
    if found["chosen"] is not None:
        _batches(found)
    _work(found)
    _asked(found, wanted)
    for program, line in found["flags"].items():
        print(f"{program}: {line}")


def _weights(found: Values) -> None:
    shown = ("bf16", "8bit", "4bit", "int8-g32", "int4-g32", "mxfp4")
    rows = [
        [
            form,
            f"{found['weight_gigabytes'][form]:,.2f}",
            f"{found['weight_gibibytes'][form]:,.2f}",
            str(found["devices_for_weights"][form]),
        ]
        for form in shown
    ]
    print_table("weights alone", ["format", "GB", "GiB", f"{found['device']['name']} needed"], rows)


def _layouts(found: Values) -> None:
    rows = [
        [
            one["format"],
            short_bytes(one["memory"]["total"])
            if one["fits"]
            else f"no: {short_bytes(one['memory']['total'])}",
            f"{100 * one['resident']:.0f} %",
            "-" if one["decode"] is None else band(one["decode"]["tokens_per_s"]),
            "-" if one["prefill"] is None else band(one["prefill"]["tokens_per_s"]),
            "-" if one["decode"] is None else one["decode"]["limit"],
        ]
        for one in found["layouts"]
    ]
    heads = ["weights", "memory", "resident", "tokens/s", "of a prompt", "limit"]
    cache = found["layouts"][0]["kv_dtype"]
    title = f"in {short_bytes(found['memory_budget_bytes'])}, keys and values in {cache}; share of experts resident"
    print_table(title, heads, rows)


def _memory(found: Values) -> None:
    one = found["layouts"][found["chosen"] or 0]
    rows = [[name, short_bytes(size)] for name, size in one["memory"].items()]
    rows += [[f"  of a step: {name}", short_bytes(size)] for name, size in found["activations"].items()]
    print_table(f"memory of {one['format']}", ["use", "size"], rows)


def _batches(found: Values) -> None:
    rows = [
        [str(one["batch"]), f"{one['distinct_experts']:g}", band(one["tokens_per_s"]), one["limit"]]
        for one in found["batches"]
        if one["batch"] in (1, 8, 32, 128)
    ]
    print_table("sequences at a time", ["sequences", "experts read", "tokens/s of all", "limit"], rows)
    if found["read_nine_tenths_of_experts_from_batch"]:
        say(
            f"from {found['read_nine_tenths_of_experts_from_batch']} sequences on a step reads nine of ten experts; "
            f"no more than {short(found['roofline_tokens_per_s'])} tokens/s can be read or multiplied"
        )


def _work(found: Values) -> None:
    flops, router = found["flops"], found["router"]
    say(
        f"work: {short(flops['per_token'])} FLOPs for a token, {short(flops['prompt'])} for the prompt "
        f"({short(flops['multiplications_of_prompt_by_active'])} multiplications by the rule of thumb, tokens x active "
        f"parameters); cache {short_bytes(found['kv_bytes_per_token'])} a token"
    )
    if router["parameters"]:
        say(
            f"routers: {short(router['parameters'])} parameters, {router['percent_of_total']:.4f} % of all and "
            f"{router['percent_of_active']:.2f} % of the active ones; {router['percent_of_flops']:.3f} % of the FLOPs"
        )
    rule = found["dense_equivalents"][0]
    say(f"as good as a dense model of about {short(rule['parameters'])} ({rule['rule']}: {rule['kind']})")


def _asked(found: Values, wanted: PlanOptions) -> None:
    """What has an option of its own."""
    money = found["cost"]
    if money and "dollars_per_million_tokens" in money:
        say(
            f"cost: {band(money['dollars_per_million_tokens'])} dollars for a million tokens ({money['source']})"
        )
        for one in found["api_prices"] if wanted.price or wanted.tokens_per_s else []:
            say(
                f"  listed: {one['name']} {one['prompt']:g} in, {one['answer']:g} out ({one['source']}, {one['date']})"
            )
    if money and "claimed_dollars_per_token" in money:
        say(f"at {wanted.tokens_per_s:g} tokens/s: {money['claimed_dollars_per_token']:.3g} dollars a token")
    if "training" in found:
        run = found["training"]
        say(
            f"training on {wanted.train_tokens}: {band(run['device_hours'])} device hours, {band(run['days'])} days, "
            f"{short_bytes(run['memory']['total'])} of memory ({run['devices_for_memory']} devices at least), "
            f"{'no price' if run['dollars'] is None else band(run['dollars']) + ' dollars'}"
        )
        _steps(run)
    if "capacity" in found:
        one = found["capacity"]
        say(
            f"capacity {wanted.capacity_factor:g}: {one['tokens_per_expert']:g} tokens an expert, "
            f"{short_bytes(one['buffer_bytes'])} of buffers a layer, {one['ratio']:.2f} times dropless; "
            f"{100 * one['dropped_share']:.2f} % dropped even if routing is uniform"
        )
    if "communication" in found:
        one = found["communication"]
        say(
            f"over {wanted.ranks} ranks: {short_bytes(one['bytes'])} sent for the prompt, "
            f"{short_bytes(one['layer_bytes'])} a layer, {band(one['seconds'], 1e3)} ms on the links"
        )
    if "against" in found:
        one = found["against"]
        say(
            f"against {one['name']}: {one['flops_percent']:.1f} % of the FLOPs saved, "
            f"{one['read_percent']:.1f} % of the reading; {1 - one['memory_percent'] / 100:.2f} times its memory"
        )


def _steps(run: Values) -> None:
    """What a step takes; and where experts are spread over nodes, the same with them inside each node."""
    parts = [
        f"{name} {band(run[key])}"
        for name, key in (
            ("computing", "computing_seconds"),
            ("all-to-alls", "exchange_seconds"),
            ("gradients", "gradient_seconds"),
        )
        if key in run
    ]
    say(
        f"a step of {short(run['step_tokens'])} tokens on {run['devices']} devices: {band(run['step_seconds'])} s "
        f"({', '.join(parts)}), {short(run['steps'])} steps"
    )
    if "inside_nodes" in run:
        other = run["inside_nodes"]
        say(
            f"with all experts in every node: {band(other['step_seconds'])} s a step, {band(other['days'])} days "
            f"(all-to-alls {band(other['exchange_seconds'])}, gradients {band(other['gradient_seconds'])} s)"
        )
    elif "exchange_seconds" not in run and run["devices"] > 1:
        say("what devices tell one another is left out: --ranks and --nodes say how experts are spread")


def show_profile(profile: Profile) -> None:
    """What was measured, with its spread."""
    rows = [
        [f"memory, {count} thread{'s' * (count != '1')}", *_spread(Figure(*one).times(1e-9)), "GB/s"]
        for count, one in profile.read_rate.items()
    ]
    rows += [
        [f"disk, {short_bytes(int(size))} at a time", *_spread(Figure(*one).times(1e-9)), "GB/s"]
        for size, one in profile.disk.items()
    ]
    for kind, table in (("experts", profile.experts), ("matrices", profile.linear)):
        for form, by_rows in table.items():
            for count, one in by_rows.items():
                rate = Figure(*(2e-9 * int(count) / seconds for seconds in (one[0], one[2], one[1])))
                rows.append([f"{kind} {form}, {count} row{'s' * (count != '1')}", *_spread(rate), "Gop/s"])
    units = {"step": (1e6, "us"), "layer": (1e6, "us"), "sequence": (1e6, "us")}
    for kind, costs in profile.overhead.items():
        for name, figure in costs.items():
            scale, unit = units.get(name, (1e12, "ps"))
            rows.append([f"{kind}: each {name}", *_spread(Figure(*figure).times(scale)), unit])
    print_table(f"this machine, {profile.threads} threads", ["what", "figure", "from", "to", "unit"], rows)
    say(
        f"{profile.disk_note}; a process takes {short_bytes(profile.process_bytes['packed'])} before any model"
    )


def _spread(one: Figure) -> list[str]:
    return [short(value) for value in one]

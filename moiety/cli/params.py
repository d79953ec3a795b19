"""`moiety params`: what a model weighs, from the registry or from its config alone."""

from __future__ import annotations

import shutil
import textwrap
from typing import Annotated, Any

from cyclopts import Parameter

from moiety import cost
from moiety.cli.named import config_named, why_so_many
from moiety.cli.output import command, parameter_rows, print_json, print_table
from moiety.config import ModelConfig

__all__ = ["app"]

app = command(
    "moiety params", "Count parameters, FLOPs and bytes of a known model, a checkpoint or a GGUF file."
)

# The three conventions of "active parameters" in use, and who counts so.
CONVENTIONS = (
    ("active", "active per token", "Mixtral, Qwen, OLMoE"),
    ("active_without_input_embedding", "  without input embedding", "gpt-oss, DeepSeek-V3"),
    ("active_without_embeddings", "  without both embeddings", "MiniMax"),
)


@app.default
def params(name: str, /, *, json: Annotated[bool, Parameter(negative="", help="print JSON")] = False) -> int:
    """Count one model; no weights are read.

    Parameters
    ----------
    name
        A name that `moiety models` lists, a folder or config.json, a .gguf file, or owner/name on the hub.
    """
    config = config_named(name)
    counts = cost.parameters(config)
    gigabytes = {
        label: cost.weight_bytes(config, bits) / 1e9
        for label, bits in (("bf16", 16), ("8bit", 8), ("4bit", 4))
    }
    result: dict[str, Any] = {
        "name": name,
        "total": counts.total,
        **{key: getattr(counts, key) for key, _, _ in CONVENTIONS},
        "active_percent": round(100 * counts.active / counts.total, 2),
        "components": dict(counts.components),
        "active_components": dict(counts.active_components),
        "weight_gigabytes": {label: round(size, 3) for label, size in gigabytes.items()},
        "per_layer": [] if config.moe is None else [list(one) for one in config.moe.per_layer],
        "why": why_so_many(name, config),
    }
    if isinstance(config, ModelConfig):
        result["flops_per_token"] = cost.flops_per_token(config).total
        result["kv_bytes_per_token"] = cost.kv_bytes_per_token(config)
    if json:
        print_json(result)
        return 0
    rows = parameter_rows(counts.components, counts.active_components)
    print_table(f"{name}: {counts.total:,} parameters", ["component", "total", "share", "active"], rows)
    for key, label, users in CONVENTIONS:
        percent = f"{100 * result[key] / counts.total:.2f} % of total, " if key == "active" else ""
        _line(label, f"{result[key]:,} ({percent}as {users} count)")
    _line("weights", ", ".join(f"{label} {size:,.2f} GB" for label, size in gigabytes.items()))
    if config.moe is not None and config.moe.per_layer:
        differ = ", ".join(f"{k} of {experts} in layer {layer}" for layer, experts, k in config.moe.per_layer)
        _line("experts per token", f"{config.moe.experts_per_token} of {config.moe.experts}, but {differ}")
    if "kv_bytes_per_token" in result:
        _line("KV cache", f"{result['kv_bytes_per_token']:,} bytes per token in bf16")
    if result["why"]:
        print()
        print(textwrap.fill(result["why"], shutil.get_terminal_size().columns))
    return 0


def _line(label: str, text: str) -> None:
    """A label and its value; on a narrow terminal one below the other's start."""
    width = shutil.get_terminal_size().columns
    if width >= 60:
        print(textwrap.fill(f"{label:<28}{text}", width, subsequent_indent=" " * 28))
    else:
        print(textwrap.fill(f"{label.strip()}: {text}", width, subsequent_indent="  "))

"""`moiety params`: what a model weighs, from the registry or a checkpoint's config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moiety import cost, registry
from moiety.cli.output import command, parameter_rows, print_json, print_table
from moiety.config import Architecture, ModelConfig

__all__ = ["app"]

app = command("moiety params", "Count parameters, FLOPs and bytes of a known model or a checkpoint folder.")


def _config(name: str) -> Architecture:
    if Path(name).is_dir():
        from moiety.model.checkpoint import load_config

        return load_config(name)
    return registry.lookup(name)


@app.default
def params(name: str, /, *, json: Annotated[bool, Parameter(negative="", help="print JSON")] = False) -> int:
    """Count one model.

    Parameters
    ----------
    name
        A registry name such as mixtral-8x7b, or a folder with a config.json.
    """
    config = _config(name)
    counts = cost.parameters(config)
    gigabytes = {
        label: cost.weight_bytes(config, bits) / 1e9
        for label, bits in (("bf16", 16), ("8bit", 8), ("4bit", 4))
    }
    result = {
        "name": name,
        "total": counts.total,
        "active": counts.active,
        "active_without_input_embedding": counts.active_without_input_embedding,
        "active_without_embeddings": counts.active_without_embeddings,
        "active_percent": round(100 * counts.active / counts.total, 2),
        "components": dict(counts.components),
        "active_components": dict(counts.active_components),
        "weight_gigabytes": {label: round(size, 3) for label, size in gigabytes.items()},
    }
    if isinstance(config, ModelConfig):
        result["flops_per_token"] = cost.flops_per_token(config).total
        result["kv_bytes_per_token"] = cost.kv_bytes_per_token(config)
    if json:
        print_json(result)
        return 0
    rows = parameter_rows(counts.components, counts.active_components)
    print_table(f"{name}: {counts.total:,} parameters", ["component", "total", "share", "active"], rows)
    print(
        f"active per token            {counts.active:,} ({100 * counts.active / counts.total:.2f} % of total)"
    )
    print(f"  without input embedding   {counts.active_without_input_embedding:,}")
    print(f"  without both embeddings   {counts.active_without_embeddings:,}")
    print(
        "weights                     "
        + ", ".join(f"{label} {size:,.2f} GB" for label, size in gigabytes.items())
    )
    if "kv_bytes_per_token" in result:
        print(f"KV cache                    {result['kv_bytes_per_token']:,} bytes per token in bf16")
    return 0

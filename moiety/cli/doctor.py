"""`moiety doctor`: what this machine offers, which parts use it, what is missing and what that costs."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table

__all__ = ["app"]

app = command("moiety doctor", "Say what this machine offers, which parts are used, and what is missing.")

EXTRAS = {
    "plotly": ("report", "`moiety demo` cannot write report.html"),
    "chatterbot_corpus": ("demo", "the default corpus has no dialogue in natural languages"),
    "lm_eval": ("eval", "`moiety eval --tasks` has no tasks"),
    "datasets": ("data", "hf:ID sources cannot be read"),
    "tensorboard": ("track", "no tracking to tensorboard"),
    "wandb": ("track", "no tracking to wandb"),
    "trackio": ("track", "no tracking to trackio"),
    "transformers": ("dev", "the tests cannot compare with transformers"),
}


def _facts() -> dict[str, Any]:
    import torch

    from moiety import backends
    from moiety.backends import cpu
    from moiety.backends.matmul import prefers_onednn
    from moiety.train import host

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = {
        name: backends.choose("auto", device, dtype)._asdict()
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": host.cpu_name(),
        "cores": torch.get_num_threads(),
        "cpu_features": host.cpu_features(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_products": "oneDNN" if prefers_onednn() else "torch's own BLAS",
        "experts": choices,
        "kernels": {"level": cpu.level(), "levels": cpu.levels(), "no_amx": cpu.no_amx()},
        "extras": {name: importlib.util.find_spec(name) is not None for name in EXTRAS},
    }


def _kernels(level: str, levels: Sequence[str], no_amx: str) -> str:
    if not level:
        return "torch unpacks them for each product, many times slower: install with a C compiler for the kernels"
    why = (
        f" (no amx: {no_amx})"
        if no_amx
        else " (amx only where it is asked for: it has run in emulation alone)"
    )
    return f"C kernels for {level}, of {', '.join(levels)}{why}; MOIETY_CPU_LEVEL chooses"


@app.default
def doctor(*, json: Annotated[bool, Parameter(negative="", help="print JSON")] = False) -> int:
    """Look at this machine. Exit code 0: what is missing here is optional."""
    facts = _facts()
    if json:
        print_json(facts)
        return 0
    present = [name for name, there in facts["cpu_features"].items() if there]
    absent = [name for name, there in facts["cpu_features"].items() if not there]
    rows = [
        ["python", facts["python"]],
        ["torch", f"{facts['torch']}, CPU code for {facts['torch_cpu_capability']}"],
        ["device", facts["device"]],
        ["processor", f"{facts['cpu']}, {facts['cores']} threads"],
        ["has", " ".join(present) or "none of the instruction sets below"],
        ["has not", " ".join(absent) or "nothing is missing"],
        ["float32 products", facts["float32_products"]],
        ["packed weights", _kernels(**facts["kernels"])],
        *(
            [f"experts in {name}", f"{choice['name']}: {choice['reason']}"]
            for name, choice in facts["experts"].items()
        ),
    ]
    print_table("this machine", ["what", "found"], rows)
    missing = [name for name, there in facts["extras"].items() if not there]
    for name in missing:
        extra, consequence = EXTRAS[name]
        print(f"not installed: {name} — {consequence}; pip install 'moiety[{extra}]'")
    if not missing:
        print("every optional package is installed")
    return 0

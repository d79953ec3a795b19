"""The demo's comparison over several seeds: `python -m recipes.compare` prints the table in the README.

An MoE and its dense twin of equal active parameters see the same tokens in the same order; each has its own
best learning rate (LOG.md has the sweep).
"""

from __future__ import annotations

import sys
from pathlib import Path

from moiety.cli import main

__all__ = ["demo_over_seeds"]


def demo_over_seeds(seeds: int = 3, out: Path = Path("runs/compare")) -> int:
    """Train the demo's twins with `seeds` seeds and print the mean and spread of every figure."""
    from moiety.observe.demo import DENSE_LEARNING_RATE, STEPS, demo_options

    options = demo_options(STEPS, seed=0)
    named = {
        "steps": options.steps,
        "batch": options.batch,
        "length": options.length,
        "learning-rate": options.learning_rate,
        "warmup": options.warmup,
        "dtype": options.dtype,
        "evaluate-every": 0,
        "evaluate-sequences": options.evaluate_sequences,
        "dense-learning-rate": DENSE_LEARNING_RATE,
        "seeds": seeds,
        "out": out,
    }
    return main(["compare", *(word for name, value in named.items() for word in (f"--{name}", str(value)))])


if __name__ == "__main__":
    sys.exit(demo_over_seeds(int(sys.argv[1]) if len(sys.argv) > 1 else 3))

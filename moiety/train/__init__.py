"""Training: texts, tokens on disk, the loop, the optimizer, adapters, the state of a run."""

"""Training: texts, tokens on disk, the loop, the optimizer, the state of a run."""

"""Fewer bits for weights: which, what it costs, and where bits are worth most."""

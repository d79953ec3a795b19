"""Whole runs as short Python functions."""

"""More than one process: who holds which part of a model, and what is sent between them."""

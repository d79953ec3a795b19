"""What is done with a trained model: sampling, plain generation, and the engine that batches requests."""

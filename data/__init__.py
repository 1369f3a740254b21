"""Data pipeline: readers -> features -> store -> samplers -> batches, and decoding of answers."""

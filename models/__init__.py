"""Models that return logits, and loss functions that return sums."""

"""What is trained: modules that return logits, and losses that are sums."""

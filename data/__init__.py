"""What goes in: readers -> features -> store -> samplers -> batches, and answers back out."""

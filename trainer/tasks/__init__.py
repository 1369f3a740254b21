"""One file per task, and what tasks share: features, generation, evaluation, metrics."""

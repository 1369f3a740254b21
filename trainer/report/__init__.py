"""Look at results: compare runs, show the errors of a model, look at data before training."""

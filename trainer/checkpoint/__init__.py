"""What survives a kill: checkpoint folders, their asynchronous writer, and resuming from them."""

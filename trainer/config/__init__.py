"""What a user can set: options, their parsing from a command line and YAML, their validation."""

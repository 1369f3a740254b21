"""The error that a user can fix."""


class InputError(ValueError):
    """A user's mistake. The message names the file, record or option and the remedy; the exit code is 2."""

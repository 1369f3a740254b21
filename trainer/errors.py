"""How a run ends when it does not end well, beside a user's mistake (data.types.InputError, exit code 2)."""

from __future__ import annotations

NUMERICAL, IO = 70, 74  # as in sysexits.h: internal software error, input/output error


class RunError(RuntimeError):
    """The run cannot go on; one line says why and what to do. exit_code: NUMERICAL or IO."""

    def __init__(self, message: str, exit_code: int = NUMERICAL) -> None:
        super().__init__(message)
        self.exit_code = exit_code

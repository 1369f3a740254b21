"""A field of a config, with its --help text and its range."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(
    default: Any,
    help_text: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Config field with its --help text and its range. A callable default is used as default_factory."""
    values = {"default_factory": default} if callable(default) else {"default": default}
    rules = {"minimum": minimum, "above": above, "below": below}
    return field(metadata={"help": help_text, "range": rules}, **values)

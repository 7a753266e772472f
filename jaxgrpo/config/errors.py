"""A user's mistake, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class ConfigError(Exception):
    """A user's mistake, told in one line: what is wrong, where, the nearest valid choice."""

    def __init__(self, message: str) -> None:
        # What it quotes, a key or another library's message, may have lines or no end.
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= 600 else f"{line[:599]}…")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_choice(value: str, choices: Sequence[str], where: str) -> None:
    """Raises ConfigError naming the nearest of `choices` unless `value` is one of them."""
    if value not in choices:
        raise ConfigError(f"{where}: unknown name '{value}'; {suggestion(value, choices)}")


def suggestion(value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else "valid: " + ", ".join(choices)

"""How many examples, and how long one may take."""

import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings

FULL = os.environ.get("JAXGRPO_FUZZ") == "full"
"""JAXGRPO_FUZZ=full runs every example; otherwise a twentieth, for the ordinary suite."""


def amount(count: int) -> int:
    """How many of `count` examples are run."""
    return count if FULL else max(count // 20, 25)


def fuzz(test: Callable[[], None], count: int, deadline_s: float = 1.0) -> None:
    """Runs a hypothesis test with `amount(count)` examples, none of which may take longer."""
    settings(
        max_examples=amount(count),
        deadline=1000 * deadline_s,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )(test)()

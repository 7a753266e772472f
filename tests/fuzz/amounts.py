"""How many examples, and how long one may take."""

import functools
import os
import time
from collections.abc import Callable

from hypothesis import HealthCheck, settings

FULL = os.environ.get("JAXGRPO_FUZZ") == "full"
"""JAXGRPO_FUZZ=full runs every example; otherwise a twentieth, for the ordinary suite."""


def amount(count: int) -> int:
    """How many of `count` examples are run."""
    return count if FULL else max(count // 20, 25)


def fuzz(test: Callable[[], None], count: int, deadline_s: float = 1.0) -> None:
    """Runs a hypothesis test with `amount(count)` examples, none of which may take longer: in time
    of this process, since the processor may be busy with others."""
    inner = test.hypothesis.inner_test  # type: ignore[attr-defined]

    @functools.wraps(inner)
    def timed(*args: object, **kwargs: object) -> None:
        start = time.thread_time()
        inner(*args, **kwargs)
        spent = time.thread_time() - start
        assert spent < deadline_s, f"{spent:.2f} s, and {deadline_s} are allowed"

    test.hypothesis.inner_test = timed  # type: ignore[attr-defined]
    settings(
        max_examples=amount(count),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )(test)()

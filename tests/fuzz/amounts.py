"""How many examples, and how long one may take."""

from collections.abc import Callable

from hypothesis import HealthCheck, settings


def fuzz(test: Callable[[], None], count: int) -> None:
    """Runs a hypothesis test with `count` examples, none of which may take longer than a second."""
    settings(
        max_examples=count,
        deadline=1000,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )(test)()

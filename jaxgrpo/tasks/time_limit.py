"""A limit on how long a block of other people's code may take. Floor 0, no jax."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class TimeLimitExceeded(BaseException):
    """The block took too long. No Exception, because the block may catch those."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimitExceeded in the block after `seconds`; 0 means no limit.

    By an alarm signal, so it interrupts Python code, regular expressions and system calls, but not
    a C extension that never comes back, and only the main thread has limits at all. A block that
    swallows it is interrupted again every second.
    """
    if seconds <= 0 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(*_: object) -> None:
        raise TimeLimitExceeded

    previous = signal.signal(signal.SIGALRM, expired)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

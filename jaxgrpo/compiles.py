"""How many programs this process has compiled, and for how long: what a run should do once."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
"""jax's name for the time that one program took to compile, or to come from the disk."""


@dataclass(frozen=True)
class Compiled:
    """Programs, and seconds."""

    programs: int = 0
    seconds: float = 0.0

    def since(self, before: Compiled) -> Compiled:
        return Compiled(self.programs - before.programs, self.seconds - before.seconds)


_so_far = Compiled()
_counting = threading.Lock()


def compiled() -> Compiled:
    """By this process so far."""
    return _so_far


def _heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _so_far
    if event == _EVENT:
        with _counting:
            _so_far = Compiled(_so_far.programs + 1, _so_far.seconds + duration_secs)


jax.monitoring.register_event_duration_secs_listener(_heard)

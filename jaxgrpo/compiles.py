"""Which programs this process has compiled, and for how long: what a run should do once."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any

import jax

_READ = "/jax/compilation_cache/cache_retrieval_time_sec"
_COMPILED = "/jax/core/compile/backend_compile_duration"
"""jax's names for the time that one program took to come from the disk, and for what it took to
compile or to come from there: the two follow each other in one thread."""


@dataclass(frozen=True)
class Program:
    """One that was compiled, or came from the disk."""

    name: str
    seconds: float
    from_disk: bool


@dataclass(frozen=True)
class Compiled:
    """Programs, how many of them came from the disk, and seconds."""

    programs: int = 0
    from_disk: int = 0
    seconds: float = 0.0

    def since(self, before: Compiled) -> Compiled:
        return Compiled(
            self.programs - before.programs,
            self.from_disk - before.from_disk,
            self.seconds - before.seconds,
        )


_programs: list[Program] = []
_thread = threading.local()


def compiled() -> Compiled:
    """By this process so far."""
    known = tuple(_programs)
    return Compiled(len(known), sum(p.from_disk for p in known), sum(p.seconds for p in known))


def longest(count: int = 5) -> list[dict[str, Any]]:
    """The programs that took longest, as what summary.json holds of them."""
    return [asdict(p) for p in sorted(_programs, key=lambda p: -p.seconds)[:count]]


def _heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _READ:
        _thread.read = True
    elif event == _COMPILED:
        name = str(kwargs.get("fun_name", "unnamed")).removeprefix("jit(").removesuffix(")")
        _programs.append(Program(name, duration_secs, getattr(_thread, "read", False)))
        _thread.read = False


jax.monitoring.register_event_duration_secs_listener(_heard)

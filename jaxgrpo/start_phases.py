"""When this process' first run had done what: what a user waits for before the first step."""

from __future__ import annotations

import time

_BEGAN = time.time()
_done: dict[str, float] = {}


def phase_done(name: str) -> None:
    """Notes that a phase is over, for the first time."""
    _done.setdefault(name, time.time() - _BEGAN)


def start_record() -> dict[str, float]:
    """As summary.json has it: `began`, in unix time, and for every phase the seconds from then to
    its end. Weights load while programs compile, so they overlap."""
    return {"began": _BEGAN, **_done}

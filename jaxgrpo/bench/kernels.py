"""What the kernels of one run took, from the profiler's own trace."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

SHOWN = 40
"""Kernels in the table; the rest is one row."""


def profile_kernels(run: Callable[[], Any], directory: Path) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of each kernel of one `run`, the longest first; a last row has what
    is left. Empty where the backend's trace has no kernels (CPU). The trace stays in `directory`,
    for TensorBoard or xprof."""
    with jax.profiler.trace(str(directory)):
        jax.block_until_ready(run())
    traces = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    calls: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                calls[event.name] += 1
                seconds[event.name] += event.duration_ns / 1e9
    rows = [
        (name, calls[name], taken)
        for name, taken in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    rest = rows[SHOWN:]
    if rest:
        left = float(sum(row[2] for row in rest))
        rows = [*rows[:SHOWN], (f"{len(rest)} others", sum(row[1] for row in rest), left)]
    return rows

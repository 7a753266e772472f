"""Watches for steps whose loss is not finite or has exploded, and keeps their batch; says so where
no reward applied to anything."""

from __future__ import annotations

import math

import jax
import numpy as np
from rich.console import Console
from safetensors.numpy import save

from jaxgrpo.mesh import to_host
from jaxgrpo.records.run_directory import DivergedError, RunDirectory, atomic_write_bytes
from jaxgrpo.step_records import StepResult

MAX_LOSS = 1e3
"""Advantages are of order one and ratios are clipped, so a loss is; a negative log-likelihood is at
most some tens."""
MAX_BAD_STEPS = 10
MAX_BATCHES = 5


class DivergenceGuard:
    """Counts bad steps in a row."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._in_a_row = 0
        self._skipped: float | None = None
        self._unrewarded = False

    def check(self, step: int, result: StepResult, console: Console) -> bool:
        """Whether the step went wrong; then its batch is on disk, as safetensors.

        Raises:
            DivergedError: the last MAX_BAD_STEPS all did.
        """
        if math.isnan(result.metrics.get("reward", 0.0)) and not self._unrewarded:
            self._unrewarded = True
            console.print(
                f"[yellow]warning:[/] step {step}: every reward function gave None for every "
                "completion, so there is nothing to learn from; further such steps are not said"
            )
        loss, skipped = result.metrics["loss"], result.metrics["grpo/skipped_updates"]
        before, self._skipped = self._skipped, skipped
        trouble = (
            f"the loss is {loss:g}"
            if not math.isfinite(loss) or abs(loss) > MAX_LOSS
            else "a gradient was not finite and its update left out"
            if before is not None and skipped > before
            else None
        )
        if trouble is None:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        path = self._run.bad_batches / f"step_{step:06d}.safetensors"
        if self._in_a_row <= MAX_BATCHES:
            batch = to_host(result.batch)
            if jax.process_index() == 0:
                self._run.bad_batches.mkdir(exist_ok=True)
                arrays = {
                    jax.tree_util.keystr(path, simple=True, separator="."): np.ascontiguousarray(x)
                    for path, x in jax.tree_util.tree_leaves_with_path(batch)
                }
                atomic_write_bytes(path, save(arrays, {"trouble": trouble, "step": str(step)}))
        console.print(
            f"[yellow]warning:[/] step {step}: {trouble}; batches to inspect are in "
            f"{self._run.bad_batches}"
        )
        if self._in_a_row >= MAX_BAD_STEPS:
            raise DivergedError(
                f"the last {MAX_BAD_STEPS} steps went wrong ({trouble}); the batches are in "
                f"{self._run.bad_batches}, the newest checkpoint is from before; a smaller "
                "optim.learning_rate is the usual cure"
            )
        return True

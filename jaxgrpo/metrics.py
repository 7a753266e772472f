"""Where numbers go: metrics.jsonl, layer_grad_norms.jsonl, TensorBoard, and a person's screen.

Metric names are TRL's, so that dashboards carry over; per-layer norms are
`grad_norm/<module>/<a|b>/layer_<ii>`. Only the first process writes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from tensorboardX import SummaryWriter

from jaxgrpo.artifacts import RunDirectory, append_jsonl, atomic_write_text, read_jsonl

# It would say a line for every number that is none, hundreds a step; the guard says one.
logging.getLogger("tensorboardX").setLevel(logging.ERROR)


class MetricWriter:
    """Writes one record per step; a context manager.

    Raises:
        OSError: a file could not be written, naming it.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._first = jax.process_index() == 0
        self._board: SummaryWriter | None = None
        self._step = 0

    def __enter__(self) -> MetricWriter:
        if self._first:
            # What a killed run wrote after the step it resumes from is hidden in TensorBoard too.
            self._board = SummaryWriter(
                str(self._run.tensorboard), purge_step=self._step + 1, flush_secs=5
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def rewind(self, step: int) -> None:
        """Drops records after `step`, which a resumed run is going to write again.

        Call it before the context is entered.
        """
        self._step = step
        if not self._first:
            return
        for path in (self._run.metrics, self._run.layer_grad_norms):
            if not path.exists():
                continue
            records = read_jsonl(path)
            # An evaluation after `step` belongs to what comes next: it is made again.
            kept = [
                record
                for record in records
                if record["step"] < step
                or (record["step"] == step and "eval/accuracy" not in record)
            ]
            kept = kept if step else []
            if len(kept) < len(records):
                atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def last_step(self) -> dict[str, float]:
        """The metrics of the newest training step on record."""
        records = read_jsonl(self._run.metrics) if self._run.metrics.exists() else []
        newest = next((r for r in reversed(records) if "loss" in r), {})
        return {k: v for k, v in newest.items() if k not in ("step", "time", "nonfinite")}

    def write(
        self, step: int, metrics: Mapping[str, float], layer_grad_norms: Mapping | None = None
    ) -> None:
        """One step's metrics and, if given, its norms: view -> module -> "a" | "b" -> [L]."""
        if not self._first:
            return
        assert self._board is not None, "MetricWriter is used outside its context"
        # JSON has no NaN: such a value is null in the file, and its name says so beside it.
        bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        record = {"step": step, "time": time.time(), **metrics}
        append_jsonl(self._run.metrics, record | ({"nonfinite": bad} if bad else {}))
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if layer_grad_norms is not None:
            append_jsonl(self._run.layer_grad_norms, {"step": step, **layer_grad_norms})
            for module, matrices in layer_grad_norms["l2"].items():
                for matrix, norms in matrices.items():
                    for layer, norm in enumerate(np.asarray(norms)):
                        name = f"grad_norm/{module}/{matrix}/layer_{layer:02d}"
                        self._board.add_scalar(name, float(norm), step)

    def write_completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Every completion of a step, one JSON object a line."""
        if not self._first:
            return
        text = "".join(json.dumps(_finite(record), ensure_ascii=False) + "\n" for record in records)
        # A half-finished multi-byte character decodes to a lone surrogate, which has no UTF-8.
        text = text.encode("utf-8", "backslashreplace").decode()
        atomic_write_text(self._run.completions / f"step_{step:06d}.jsonl", text)


def _finite(value: Any) -> Any:
    """NaN and infinity as null, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressBar:
    """Steps done, reward, tokens per second and time left; plain lines where there is no terminal.

    A context manager.
    """

    def __init__(self, steps: int, start: int, console: Console, every_s: float = 10.0) -> None:
        self._steps, self._console, self._every_s = steps, console, every_s
        self._live = console.is_terminal
        self._last_line = self._began = time.perf_counter()
        self._start = start
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._live,
        )
        self._task: TaskID = self._progress.add_task(
            "training", total=steps, completed=start, numbers=""
        )

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Shows the state after step `done`."""
        name = "reward" if "reward" in metrics else "loss"
        numbers = (
            f"{name} {metrics[name]:.3f}  {metrics['throughput/tokens_per_s']:,.0f} tok/s  "
            f"{metrics['completions/mean_length']:.0f} tok/completion"
        )
        self._progress.update(self._task, completed=done, numbers=numbers)
        now = time.perf_counter()
        due = now - self._last_line >= self._every_s or done in (self._start + 1, self._steps)
        if not self._live and due:
            self._last_line = now
            left = (now - self._began) / (done - self._start) * (self._steps - done)
            self._console.print(
                f"step {done}/{self._steps}  {numbers}  {left:.0f} s left", highlight=False
            )

    def print(self, renderable: Any) -> None:
        """Prints above the bar."""
        self._console.print(renderable)


def completions_table(step: int, records: Sequence[Mapping[str, Any]], rows: int = 4) -> Table:
    """The best and the worst completions of a step, for a person to read."""
    table = Table(title=f"completions at step {step}", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=3, overflow="fold")
    table.add_column("completion", ratio=5, overflow="fold")
    table.add_column("reward", justify="right")
    table.add_column("advantage", justify="right")
    ordered = sorted(records, key=lambda record: -np.nan_to_num(record["reward"]))
    half = rows // 2
    chosen = ordered if len(ordered) <= rows else [*ordered[:half], *ordered[-(rows - half) :]]
    for record in chosen:
        # Text of a model is not markup: there "[b]" is a style and ":100:" a picture.
        table.add_row(
            _plain(record["prompt"], -160),
            _plain(record["completion"], 320),
            f"{record['reward']:.2f}",
            f"{record['advantage']:+.2f}",
        )
    return table


def _plain(text: str, limit: int) -> Text:
    """At most |limit| characters, from the end if negative, safe for rich and the terminal."""
    cut = (
        text
        if len(text) <= abs(limit)
        else (f"…{text[limit:]}" if limit < 0 else text[:limit] + "…")
    )
    shown = "".join(c if c.isprintable() or c == "\n" else "�" for c in cut)
    return Text(shown.strip())

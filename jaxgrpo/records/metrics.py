"""Where numbers go: metrics.jsonl, layer_grad_norms.jsonl, TensorBoard, wandb, and a table.

Metric names are TRL's, so that dashboards carry over; per-layer norms are
`grad_norm/<module>/<a|b>/layer_<ii>`. Only the first process writes.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from jaxgrpo.records.heat_map import heat_map
from jaxgrpo.records.run_directory import RunDirectory, append_jsonl, atomic_write_text, read_jsonl
from jaxgrpo.records.tracking import WandbTracker

# tensorboardX imports torch where there is one, seconds of every start, for tensors of its that
# nobody gives it here: to this import there is none.
_HIDDEN = sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
from tensorboardX import SummaryWriter  # noqa: E402
from tensorboardX.summary import hparams, scalar  # noqa: E402

if _HIDDEN:
    del sys.modules["torch"]

# It would say a line for every number that is none, hundreds a step; the guard says one.
logging.getLogger("tensorboardX").setLevel(logging.ERROR)


class MetricWriter:
    """Writes one record per step; a context manager.

    Args:
        settings: the run's, dotted name -> value; `wandb_project` among them is where to log too.

    Raises:
        OSError: a file could not be written, naming it.
        ConfigError: wandb does not start.
    """

    def __init__(self, run: RunDirectory, settings: Mapping[str, Any] | None = None) -> None:
        self._run = run
        self._settings = dict(settings or {})
        self._tracker: WandbTracker | None = None
        self._first = jax.process_index() == 0
        self._board: SummaryWriter | None = None
        self._step = 0

    def __enter__(self) -> MetricWriter:
        if self._first:
            # What a killed run wrote after the step it resumes from is hidden in TensorBoard too.
            self._board = SummaryWriter(
                str(self._run.tensorboard), purge_step=self._step + 1, flush_secs=5
            )
            if project := self._settings.get("wandb_project"):
                self._tracker = WandbTracker(project, self._run.root, self._settings)
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish()

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
        scalars = dict(metrics)
        if layer_grad_norms is not None:
            append_jsonl(self._run.layer_grad_norms, {"step": step, **layer_grad_norms})
            for module, matrices in layer_grad_norms["l2"].items():
                for matrix, norms in matrices.items():
                    for layer, norm in enumerate(np.asarray(norms)):
                        scalars[f"grad_norm/{module}/{matrix}/layer_{layer:02d}"] = float(norm)
        self._add_scalars(scalars, step)
        if self._tracker is not None:
            self._tracker.log(step, scalars)

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """All in one event: the writer's thread takes ten at a time and lets a step wait for it,
        and every layer's norms are hundreds."""
        assert self._board is not None and self._board.file_writer is not None
        whole, *others = (scalar(name, value) for name, value in scalars.items())
        for summary in others:
            whole.value.extend(summary.value)
        self._board.file_writer.add_summary(whole, step)

    def write_samples(
        self, step: int, layer_grad_norms: Mapping, records: Sequence[Mapping[str, Any]]
    ) -> None:
        """For a person to look at: a heat map per view of the norms, and some completions."""
        if not self._first:
            return
        assert self._board is not None, "MetricWriter is used outside its context"
        images = {
            f"heat_map/{view}": heat_map(norms, f"{title}, step {step}")
            for view, title in _VIEWS.items()
            if (norms := layer_grad_norms.get(view))
        }
        for name, image in images.items():
            self._board.add_image(name, image, step, dataformats="HWC")
        shown = best_and_worst(records, 4)
        for place, record in enumerate(shown):
            self._board.add_text(f"completions/{place}", _as_markdown(record), step)
        if self._tracker is not None:
            self._tracker.log_samples(step, images, shown)

    def write_result(self, step: int, metrics: Mapping[str, float]) -> None:
        """The finished run: its settings beside its numbers, for the comparison of runs."""
        if not self._first:
            return
        assert self._board is not None, "MetricWriter is used outside its context"
        plain = {
            name: value if isinstance(value, str | bool | int | float) else str(value)
            for name, value in self._settings.items()
            if not name.startswith(_NOT_COMPARED)
        }
        # Into the run's own file: `add_hparams` opens another, a second run to TensorBoard, or
        # within the same second the same file once more.
        assert self._board.file_writer is not None
        for summary in hparams(plain, dict(metrics)):
            self._board.file_writer.add_summary(summary)
        self._add_scalars(metrics, step)
        if self._tracker is not None:
            self._tracker.result(metrics)

    def write_completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Every completion of a step, one JSON object a line."""
        if not self._first:
            return
        text = "".join(_line(record) + "\n" for record in records)
        # A half-finished multi-byte character decodes to a lone surrogate, which has no UTF-8.
        text = text.encode("utf-8", "backslashreplace").decode()
        atomic_write_text(self._run.completions / f"step_{step:06d}.jsonl", text)


def _line(record: Mapping[str, Any]) -> str:
    """As JSON; what is not finite, which is rare, is looked for only where there is some."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(record), ensure_ascii=False)


def _finite(value: Any) -> Any:
    """NaN and infinity as null, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# TensorBoard's table has room for what is varied; everything is in config.yaml.
_NOT_COMPARED = ("run_dir", "data.", "eval.", "mesh.", "checkpoint_", "keep_", "log_", "wandb_")
_VIEWS = {
    "l2": "gradient norm (L2)",
    "rank_free": "gradient norm / (scale x sqrt rank)",
    "weight": "gradient norm of the frozen weight",
}


def best_and_worst(records: Sequence[Mapping[str, Any]], rows: int) -> list[Mapping[str, Any]]:
    """At most `rows` completions: half of them those with most reward, half those with least."""
    ordered = sorted(records, key=lambda record: -np.nan_to_num(record["reward"]))
    half = rows // 2
    return ordered if len(ordered) <= rows else [*ordered[:half], *ordered[-(rows - half) :]]


def _as_markdown(record: Mapping[str, Any]) -> str:
    """A completion as TensorBoard shows text: what a model wrote stays in a block of its own."""
    parts = [
        f"reward {record['reward']:.2f}, advantage {record['advantage']:+.2f}, "
        f"{record['tokens']} tokens, {record['finish_reason']}"
    ]
    for name in ("prompt", "completion", "answer"):
        text = _plain(str(record[name]), 4000).plain
        parts.append(f"{name}\n\n" + "\n".join(f"    {line}" for line in text.split("\n")))
    return "\n\n".join(parts)


def completions_table(step: int, records: Sequence[Mapping[str, Any]], rows: int = 4) -> Table:
    """The best and the worst completions of a step, for a person to read."""
    table = Table(title=f"completions at step {step}", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=3, overflow="fold")
    table.add_column("completion", ratio=5, overflow="fold")
    table.add_column("reward", justify="right")
    table.add_column("advantage", justify="right")
    for record in best_and_worst(records, rows):
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

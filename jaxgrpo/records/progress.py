"""How far a long stage is: a bar on a terminal, plain lines elsewhere. Floor 0: rich only."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

PLAIN_LINES_EVERY_S = 10.0


class Stage:
    """A stage of known length, such as loading or evaluating; a context manager.

    On a terminal its bar goes away when it ends; elsewhere a line is printed every `every_s`
    seconds, also while a part takes long, so that a short stage says nothing.

    Args:
        total: how many parts it has.
        done: how many of them are done already.
        title: what its bar is called, if not by its name.
    """

    def __init__(
        self,
        name: str,
        total: int,
        console: Console,
        done: int = 0,
        every_s: float = PLAIN_LINES_EVERY_S,
        keep: bool = False,
        title: str = "",
    ) -> None:
        self._title = title or name
        self._name, self._total, self._console, self._every_s = name, total, console, every_s
        self._live = console.is_terminal and not console.quiet
        self._began = self._last_line = time.perf_counter()
        self._began_with = done
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=not keep,
            disable=not self._live,
        )
        self._task = self._progress.add_task(self._title, total=total, completed=done, numbers="")
        self._doing, self._done = "", done
        self._ended = threading.Event()
        self._waiting = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> Self:
        self._progress.start()
        if not self._live and not self._console.quiet and self._every_s:
            self._waiting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._waiting.is_alive():
            self._waiting.join()
        self._progress.stop()

    def _wait(self) -> None:
        """Says that a part is still going on, where no bar moves."""
        while not self._ended.wait(max(self._last_line + self._every_s - time.perf_counter(), 0)):
            now = time.perf_counter()
            if now - self._last_line >= self._every_s:
                self._last_line = now
                at = f"{self._name} {self._done}/{self._total}"
                doing = self._doing or "going on"
                self._console.print(
                    f"{at}  {doing}, {self.elapsed_s:.0f} s so far", highlight=False
                )

    @property
    def elapsed_s(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began

    def update(self, done: int, numbers: str = "", line_due: bool = False) -> None:
        """Shows that `done` parts are done, with some numbers; `line_due`: also as a plain line."""
        self._progress.update(self._task, completed=done, numbers=numbers)
        self._done = done
        now = time.perf_counter()
        if not self._live and (line_due or now - self._last_line >= self._every_s):
            self._last_line = now
            left = (now - self._began) / max(done - self._began_with, 1) * (self._total - done)
            text = f"{self._name} {done}/{self._total}  {numbers}  {left:.0f} s left"
            self._console.print(text.replace("    ", "  "), highlight=False)

    def say(self, doing: str) -> None:
        """What the stage is at within the next part; "" is nothing in particular."""
        self._doing = doing
        title = f"{self._title}: {doing}" if doing else self._title
        self._progress.update(self._task, description=title)

    def restart_clock(self) -> None:
        """Leaves what has been done so far, compiling for instance, out of the time left."""
        self._began = time.perf_counter()
        self._began_with = int(self._progress.tasks[self._task].completed)


class ProgressBar(Stage):
    """The steps of a run: reward, tokens per second and time left."""

    def __init__(
        self, steps: int, start: int, console: Console, every_s: float = PLAIN_LINES_EVERY_S
    ) -> None:
        super().__init__("step", steps, console, start, every_s, keep=True, title="training")
        self._start, self._steps = start, steps

    def at(self, phase: str, step: int) -> None:
        """Says what step `step` (from 0) is doing: rollout, reward or train."""
        # What runs for the first time in a process is compiled first.
        compiling = step == self._start and phase != "reward"
        doing = f"compiling the {phase} program" if compiling else phase
        self.say(doing)
        if compiling and not self._live:
            self._console.print(doing, highlight=False)

    def after(self, done: int, metrics: Mapping[str, float]) -> None:
        """Shows the state after step `done`."""
        name = "reward" if "reward" in metrics else "loss"
        numbers = f"{name} {metrics[name]:.3f}  {metrics['throughput/tokens_per_s']:,.0f} tok/s"
        if not self._live:  # a terminal may have no more than 80 columns
            numbers += f"  {metrics['completions/mean_length']:.0f} tok/completion"
        self.update(done, numbers, line_due=done in (self._start + 1, self._steps))
        if done == self._start + 1:
            self.restart_clock()
        if done == self._steps:
            self.say("")

    def print(self, renderable: Any) -> None:
        """Prints above the bar."""
        self._console.print(renderable)

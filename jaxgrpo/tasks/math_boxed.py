r"""The reward for MATH-style problems: is what stands in the last \boxed{} the gold answer?

math-verify decides, in processes of its own: one that hangs, crashes or eats memory is killed, its
completion counts as wrong and is named in a warning, and the others go on. Floor 0: no jax.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import re
import selectors
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxgrpo.tasks.answers import boxed_answer, last_box
from jaxgrpo.tasks.math_notation import comparisons

VERIFY_TIMEOUT_S = 3.0
"""Processor time that one comparison may take; one that is not meant to hang takes milliseconds."""
WAIT_FACTOR = 10
"""By the clock a comparison may take this much longer: the processor may be somebody else's."""
START_TIMEOUT_S = 60.0
MAX_WORKERS = 8
_BARE_BOX = re.compile(r"\\fbox\s*\{([^{}]*)\}|\\boxed\s+([^\s{$][^{$\n]{0,80})")
_WORKER = Path(__file__).with_name("math_worker.py")


def check_math_verify() -> None:
    """Raises ValueError, with what to install, where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "reward 'math_boxed' needs the package math-verify: pip install 'jaxgrpo[math]'"
        )


def gold_math_answer(answer: str) -> str:
    r"""The LaTeX of a gold answer: in its last \boxed{}, or all of a short text without one.

    A gold answer is the whole text: it is never cut at a "Question:" line. MATH also has
    ``\fbox{5}`` and, up to the closing dollar, ``\boxed 5``.

    Raises:
        ValueError: there is none, so nothing could ever be right.
    """
    gold = last_box(answer)
    if gold is None and (bare := _BARE_BOX.findall(answer)):
        gold = "".join(bare[-1]).strip()
    if gold is None and "\\boxed" not in answer and "\n" not in answer.strip():
        gold = answer.strip().strip("$").strip()
    if not gold:
        raise ValueError(f"gold answer has nothing in \\boxed{{}}: {answer[-80:]!r}")
    return gold


def math_boxed_reward(
    completions: Sequence[str], answers: Sequence[str], **context: object
) -> list[float | None]:
    r"""1.0 where the completion's last \boxed{} is mathematically the gold answer, else 0.0.

    Raises:
        ValueError: a gold answer holds nothing to compare with, or no process could be started.
    """
    golds = [gold_math_answer(answer) for answer in answers]
    given = [boxed_answer(completion) for completion in completions]
    rewards: list[float | None] = [0.0] * len(completions)
    rows: dict[tuple[str, str], list[int]] = {}
    for row, (gold, answer) in enumerate(zip(golds, given, strict=True)):
        if answer is not None:
            rows.setdefault((gold, answer), []).append(row)
    # Completions of one problem agree more often than not: each pair is compared once.
    wanted = {pair: comparisons(*pair) for pair in rows}
    tasks = list(dict.fromkeys(task for of in wanted.values() for task in of if task[0] != task[1]))
    verdicts = dict(zip(tasks, _verdicts(tasks), strict=True))
    for pair, where in rows.items():
        found = [gold == answer or verdicts[gold, answer] for gold, answer in wanted[pair]]
        if None in found and True not in found:
            warnings.warn(
                f"math-verify hung or crashed comparing {pair[1]!r:.120} with {pair[0]!r:.80} and "
                f"was killed; it counts as wrong: {completions[where[0]][-200:]!r}",
                stacklevel=2,
            )
        for row in where:
            rewards[row] = float(True in found)
    return rewards


def _verdicts(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Whether gold and answer of each pair are equal; None where the comparison was killed."""
    global _pool
    if not pairs:
        return []
    if _pool is None or _pool.owner != os.getpid():
        _pool = WorkerPool(min(MAX_WORKERS, os.cpu_count() or 1))
        atexit.register(_pool.close)
    return _pool.verify(pairs)


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    task: int | None = None
    ready: bool = False


class WorkerPool:
    """Processes that compare answers, started when they are needed and replaced when they die."""

    def __init__(self, count: int, timeout_s: float = VERIFY_TIMEOUT_S) -> None:
        self.owner = os.getpid()
        self._count, self._timeout_s = count, timeout_s
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """One verdict a pair, None where the comparison took too long or its process died.

        Raises:
            ValueError: processes cannot even start.
        """
        verdicts: list[bool | None] = [None] * len(pairs)
        waiting = list(reversed(range(len(pairs))))
        try:
            while waiting or any(worker.task is not None for worker in self._workers):
                busy = sum(worker.task is not None for worker in self._workers)
                while len(self._workers) < min(self._count, busy + len(waiting)):
                    self._start()
                for worker in [w for w in self._workers if w.ready and w.task is None]:
                    if waiting:
                        self._give(worker, waiting.pop(), pairs)
                self._collect(verdicts)
        except BaseException:  # a time limit from outside, say: no half-done task may stay
            self.close()
            raise
        return verdicts

    def close(self) -> None:
        """Ends every process."""
        for worker in [*self._workers]:
            self._end(worker)

    def _start(self) -> None:
        # -P: nothing in this script's folder can hide a module of the standard library.
        command = [sys.executable, "-P", str(_WORKER), str(self._timeout_s)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which decides when to stop
        )
        worker = _Worker(process, time.monotonic() + START_TIMEOUT_S)
        self._workers.append(worker)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)

    def _give(self, worker: _Worker, task: int, pairs: Sequence[tuple[str, str]]) -> None:
        worker.task, worker.deadline = task, time.monotonic() + WAIT_FACTOR * self._timeout_s
        assert worker.process.stdin is not None
        try:
            # Within a pipe's capacity: an answer has a few hundred characters.
            worker.process.stdin.write(json.dumps(pairs[task]).encode() + b"\n")
            worker.process.stdin.flush()
        except BrokenPipeError:
            self._end(worker)

    def _collect(self, verdicts: list[bool | None]) -> None:
        """Waits for the next answer, death or deadline."""
        engaged = [w for w in self._workers if w.task is not None or not w.ready]
        first = min((worker.deadline for worker in engaged), default=time.monotonic())
        for key, _ in self._selector.select(max(0.0, first - time.monotonic())):
            worker, line = key.data, key.fileobj.readline()  # type: ignore[union-attr]
            if not line:
                self._died(worker)
            elif worker.task is None:
                worker.ready = True
            else:
                verdicts[worker.task], worker.task = json.loads(line), None
        for worker in [*self._workers]:
            if time.monotonic() > worker.deadline and (worker.task is not None or not worker.ready):
                self._died(worker)

    def _died(self, worker: _Worker) -> None:
        self._end(worker)
        if not worker.ready:
            raise ValueError(
                "a math-verify process does not start; try: "
                f"{sys.executable} -P {_WORKER} {self._timeout_s:g}"
            )

    def _end(self, worker: _Worker) -> None:
        process = worker.process
        assert process.stdin is not None and process.stdout is not None
        self._workers.remove(worker)
        self._selector.unregister(process.stdout)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was never read is flushed on closing
                pipe.close()


_pool: WorkerPool | None = None

"""Several processes as one job: found and joined at the start, kept in agreement, ended together.

A TPU pod, SLURM and Open MPI say themselves who belongs together; anywhere else the environment
does, by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Every process runs the same
program; the first one logs and writes. A collective waits for a lost process for ever, so a thread
watches: each process says every few seconds that it is alive, and when one stops, all others do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgrpo.config import ConfigError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PERIOD_S = 2.0
LOST_S = 20.0
"""A process that has not been heard of for so long is lost; its own thread speaks even while the
main one compiles."""
CONNECT_S = 300


def find_job(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What jax.distributed.initialize wants, {} if it finds that out itself; None: one process.

    Raises:
        ConfigError: the environment says half of it, or what cannot be.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if environment.get("JAX_NUM_PROCESSES") == "1":
        return None
    if given:
        return _explicit(environment)
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return {}
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return {}
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return {}
    tpu = glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")
    if tpu and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and _has_libtpu():
        return {}
    return None


def _explicit(environment: Mapping[str, str]) -> dict[str, Any]:
    missing = [name for name in EXPLICIT if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be set too: a job of several processes needs "
            f"{', '.join(EXPLICIT)}"
        )
    address, count, index = (environment[name] for name in EXPLICIT)
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS={address:.80} is not HOST:PORT")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ConfigError(
            f"JAX_PROCESS_ID={index:.20} must be a number below JAX_NUM_PROCESSES={count:.20}"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        # Otherwise jax would still ask a cluster around it which devices are this process'.
        "cluster_detection_method": "deactivate",
    }


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Joins this process' job, if it belongs to one; gives whether it is the one that logs.

    A failure inside the block is told to the others, which then end as this one does. A lost
    process ends this one with a line and exit code 1.

    Raises:
        ConfigError: the job cannot be joined.
    """
    started = jax.distributed.is_initialized()  # by Ray, for instance
    arguments = {} if started else find_job(os.environ)
    if arguments is None:
        yield True
        return
    try:
        if not started:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(**arguments, initialization_timeout=CONNECT_S)
    except (RuntimeError, ValueError, OSError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot join the other processes of this job: {line}; set JAX_NUM_PROCESSES=1 to run "
            "on this host alone"
        ) from None
    watch = Watch()
    watch.start()
    try:
        yield jax.process_index() == 0
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            # A collective that lost its partner fails before the watch has noticed why.
            watch.join(LOST_S + 3 * PERIOD_S)
        codes = {ConfigError: 2, KeyboardInterrupt: 130}
        text = str(error) or type(error).__name__
        watch.fail(" ".join(text.split())[:300], codes.get(type(error), 1))
        raise
    watch.finish()


class Watch(threading.Thread):
    """Tells the others that this process lives, and ends it when one of them does not."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        # Nothing public reaches the store that jax.distributed keeps for its own needs.
        from jax._src import distributed

        self._store: Any = distributed.global_state.client
        self._me, self._count = jax.process_index(), jax.process_count()
        self._heard = {i: (time.monotonic(), "") for i in range(self._count) if i != self._me}
        self._ended = threading.Event()
        self._last_words = LastWords(
            f"error: process {self._me} of the job was ended from outside: process 0 was lost, or "
            f"it was killed itself; {KEPT}"
        )

    def run(self) -> None:
        beat = 0
        while not self._ended.wait(PERIOD_S):
            beat += 1
            try:
                self._set("alive", str(beat))
                self._look()
            except Exception as error:  # the store is process 0's, and it is gone
                if not self._ended.is_set():
                    line = (str(error).splitlines() or [""])[0][:200]
                    self._end(f"process 0 of the job was lost ({line})")

    def _look(self) -> None:
        now = time.monotonic()
        for other, (since, last) in list(self._heard.items()):
            if (reason := self._get(f"failed/{other}")) is not None:
                self._set("told", reason)
                self._end(f"process {other} of the job failed: {reason}")
            if self._get(f"done/{other}") is not None:
                del self._heard[other]
                continue
            beat = self._get(f"alive/{other}") or ""
            if beat != last:
                self._heard[other] = (now, beat)
            elif now - since > LOST_S and last:
                self._end(f"process {other} of the job was lost: no sign of it for {LOST_S:.0f} s")

    def fail(self, reason: str, code: int) -> None:
        """Tells the others why this process ends with `code`, and waits until they have read it."""
        self._ended.set()
        with contextlib.suppress(Exception):
            self._set("failed", reason or "unknown")
            deadline = time.monotonic() + 4 * PERIOD_S
            others = [i for i in range(self._count) if i != self._me]
            while others and time.monotonic() < deadline:
                others = [i for i in others if not self._knows(i)]
                time.sleep(0.1)
        self._last_words.withdraw()
        # Leaving jax.distributed in order would wait for processes that are not coming.
        threading.Thread(target=_exit_soon, args=(code,), daemon=True).start()

    def _knows(self, other: int) -> bool:
        """Whether a process has been told, or fails by itself."""
        return any(self._get(f"{what}/{other}") is not None for what in ("told", "failed"))

    def finish(self) -> None:
        self._set("done", "yes")
        self._ended.set()
        self._last_words.withdraw()

    def _set(self, what: str, value: str) -> None:
        self._store.key_value_set(f"jaxgrpo/{what}/{self._me}", value, allow_overwrite=True)

    def _get(self, key: str) -> str | None:
        try:
            return self._store.key_value_try_get(f"jaxgrpo/{key}")
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def _end(self, why: str) -> None:
        self._last_words.withdraw()
        print(f"error: {why}; {KEPT}", file=sys.stderr, flush=True)
        os._exit(1)


class LastWords:
    """A line that is printed if this process ends without withdrawing it.

    When process 0 dies, jax' own library aborts the others at once, with a page about RPCs; nothing
    in this process can then speak any more, so another one does.
    """

    def __init__(self, line: str) -> None:
        # In a session of its own: what ends this process shall not end that one.
        self._speaker = subprocess.Popen(
            [sys.executable, "-I", "-c", _SPEAK, line],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def withdraw(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._speaker.communicate(b"withdrawn", timeout=5)


_SPEAK = """
import sys
if not sys.stdin.read():
    print(sys.argv[1], file=sys.stderr)
"""
KEPT = "the last checkpoint is kept: start the job again to go on from it"


def _exit_soon(code: int) -> None:
    """Ends the process once the error has been printed, whatever still waits for the others."""
    time.sleep(2.0)
    sys.stderr.flush()
    os._exit(code)


def first_process() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray([flag]))))


def check_agreement(what: str, text: str) -> None:
    """Refuses to start processes that would each do something else.

    Raises:
        ConfigError: on every process, naming the first one whose `text` differs.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    every = np.asarray(multihost_utils.process_allgather(digest)).reshape(-1, len(digest))
    for index, other in enumerate(every):
        if not np.array_equal(other, every[0]):
            raise ConfigError(f"processes 0 and {index} of the job have different {what}")


def check_shared(directory: Path) -> None:
    """Raises ConfigError, on every process, unless all of them see this same directory."""
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.asarray([secrets.randbits(31)], np.int32))
    path = directory / f".shared-{int(token[0])}.tmp"
    if first_process():
        path.touch()
    multihost_utils.sync_global_devices("the shared directory's mark is there")
    deadline = time.monotonic() + 10.0
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)  # a network file system may show it late
    missing = any_process(not path.exists())
    if first_process():
        path.unlink(missing_ok=True)
    if missing:
        raise ConfigError(
            f"run_dir {directory} is not the same directory on every host; put it on a file system "
            "that all of them share"
        )


def own_part(count: int) -> slice:
    """This process' part of `count` things, in order of the processes."""
    return _part(count, jax.process_index())


def _part(count: int, index: int) -> slice:
    total = jax.process_count()
    return slice(index * count // total, (index + 1) * count // total)


def gather_parts(values: np.ndarray) -> np.ndarray:
    """[..., B] float64 with every process' own part filled in -> whole on all of them."""
    if jax.process_count() == 1:
        return values
    # As 32-bit words: jax would round what has 64.
    words = np.ascontiguousarray(values, np.float64).view(np.uint32)
    every = np.asarray(multihost_utils.process_allgather(words)).view(np.float64)
    whole = np.empty_like(values)
    for index in range(jax.process_count()):
        part = _part(values.shape[-1], index)
        whole[..., part] = every[index][..., part]
    return whole

"""Arms as Ray tasks, or as JaxTrainer runs where an arm spans hosts.

A task trains as many alike arms side by side as `study.together` says. A worker that is lost
(killed, preempted, its node gone) loses nothing but the steps since its arms' last checkpoints:
they are started again elsewhere and go on from there. Files are the only thing that workers share,
so run_dir must be on a file system that all nodes see.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import dump_config, encode_config
from jaxgrpo.records.run_directory import RunDirectory, atomic_write_text
from jaxgrpo.study.cluster_worker import PREPARE, run_over_hosts, run_part
from jaxgrpo.study.config import Arm, StudyConfig, StudyFiles, list_arms
from jaxgrpo.study.factorial import has_ended
from jaxgrpo.study.runs import arm_configs, check_same_study

POLL_S = 1.0


@dataclass
class Job:
    """A study's preparation, or one of its arms with what it trains with.

    Attributes:
        number: of `list_arms`, or PREPARE.
        state: waiting, running, done or failed.
        lost: how many workers it has lost.
    """

    study: StudyConfig
    number: int
    name: str
    arm: Arm | None = None
    config: Config | None = None
    state: str = "waiting"
    lost: int = 0
    reason: str = ""


def run_on_ray(settings: Any, studies: list[StudyConfig], console: Console) -> None:
    """Prepares every study and trains its arms, as many at a time as the cluster has room for.

    Args:
        settings: SweepSettings.

    Raises:
        ConfigError: no cluster, or one that can never hold an arm; or an arm's own.
        OSError: an arm failed for good.
    """
    places = _connect(settings)
    with contextlib.ExitStack() as held:
        for study in studies:
            check_same_study(study)
            root = RunDirectory(StudyFiles(study.run_dir).root)
            root.root.mkdir(parents=True, exist_ok=True)
            held.enter_context(root.lock())
            atomic_write_text(root.config, dump_config(study))
        try:
            failed = _Board(settings, studies, console, places).run()
        finally:
            ray.shutdown()
    if failed:
        job = failed[0]
        raise OSError(f"{len(failed)} of the sweep's runs failed, first {job.name}: {job.reason}")


def _connect(settings: Any) -> int:
    """Joins or starts a cluster; gives how many tasks it can run at the same time."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray would otherwise hide a worker's accelerators from tasks that ask for none of them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    local = settings.address is None
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}} if local else {}
    try:
        ray.init(
            address="local" if local else settings.address,
            runtime_env=environment or None,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"sweep.address={settings.address}: no Ray cluster: {line}") from None
    there = ray.cluster_resources()
    wanted = {"CPU": settings.cpus, "GPU": settings.gpus, "TPU": settings.tpus}
    wanted = {name: each * settings.hosts for name, each in wanted.items() if each}
    for name, count in wanted.items():
        if count > there.get(name, 0):
            ray.shutdown()
            raise ConfigError(
                f"sweep: an arm needs {count:g} {name}, the cluster has {there.get(name, 0):g}"
            )
    return min((int(there[name] / count) for name, count in wanted.items()), default=1)


class _Board:
    """Starts jobs, watches them, starts lost ones again, and shows where they are."""

    def __init__(
        self, settings: Any, studies: list[StudyConfig], console: Console, places: int
    ) -> None:
        self._settings, self._console, self._places = settings, console, places
        self._jobs: list[Job] = []
        self._running: dict[Any, list[Job]] = {}
        for study in studies:
            name = Path(study.run_dir).name
            self._jobs.append(Job(study, PREPARE, f"{name}: profiles and plans"))
            configs = arm_configs(study)
            for number, (arm, config) in enumerate(zip(list_arms(study), configs, strict=True)):
                self._jobs.append(Job(study, number, f"{name}: {arm.name}", arm, config))

    def run(self) -> list[Job]:
        """Until nothing can be started any more; gives the jobs that failed."""
        live = self._console.is_terminal
        with Live(console=self._console, refresh_per_second=1) if live else _NoLive() as shown:
            self._start_ready()
            while self._running:
                ready, _ = ray.wait(list(self._running), timeout=POLL_S)
                for ref in ready:
                    self._finish(ref, self._running.pop(ref))
                self._start_ready()
                shown.update(Group(self.table()))
        self._console.print(self.table())
        return [job for job in self._jobs if job.state == "failed"]

    def _start_ready(self) -> None:
        for job in self._jobs:
            if job.number == PREPARE and job.state == "waiting":
                self._start([job])
            elif job.number == PREPARE and job.state == "done":
                self._start_arms(job.study)

    def _start_arms(self, study: StudyConfig) -> None:
        """Those of a prepared study that wait, in its rounds; of what is done there is none."""
        waiting = [job for job in self._jobs if job.study is study and job.state == "waiting"]
        if not waiting:
            return
        for numbers in json.loads(StudyFiles(study.run_dir).rounds.read_text(encoding="utf-8")):
            if together := [job for job in waiting if job.number in numbers]:
                self._start(together)
        for job in waiting:
            job.state = "done" if job.state == "waiting" else job.state

    def _start(self, jobs: list[Job]) -> None:
        """As one task."""
        settings = self._settings
        raw = json.dumps(encode_config(jobs[0].study))
        given = (raw, [job.number for job in jobs], self._places)
        if settings.hosts > 1:
            task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(run_over_hosts)
            ref = task.remote(*given, settings)
        else:
            resources = {"TPU": settings.tpus} if settings.tpus else {}
            task = ray.remote(
                num_cpus=settings.cpus,
                num_gpus=settings.gpus,
                resources=resources,
                max_retries=0,
                # A worker keeps an accelerator's memory until it ends.
                max_calls=1,
            )(run_part)
            ref = task.remote(*given)
        self._running[ref] = jobs
        for job in jobs:
            job.state = "running"

    def _finish(self, ref: Any, jobs: list[Job]) -> None:
        try:
            outcome = ray.get(ref)
        except (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.OutOfMemoryError,
            exceptions.ObjectLostError,
        ) as error:
            outcome = ("lost", (str(error).splitlines() or [""])[0])
        except exceptions.RayError as error:
            outcome = ("failed", (str(error).splitlines() or [""])[-1])
        kind, reason = outcome
        for job in jobs:
            # Whatever became of those beside it.
            self._note(job, "done" if _is_ended_arm(job) else kind, reason)

    def _note(self, job: Job, kind: str, reason: str) -> None:
        """What became of a job: done, lost or failed."""
        job.reason = "" if kind == "done" else reason
        if kind == "lost" and job.lost < self._settings.retries:
            job.lost += 1
            job.state = "waiting"
            self._console.print(f"{job.name}: its worker was lost; starting it again")
        else:
            job.state = "done" if kind == "done" else "failed"
            if not self._console.is_terminal:
                self._console.print(f"{job.name}: {job.state} {job.reason}".rstrip())

    def table(self) -> Table:
        """Every job, its step and what it has come to."""
        table = Table(title="sweep", title_justify="left")
        for heading in ("run", "state", "step", "reward", "workers lost"):
            table.add_column(heading, justify="left" if heading in ("run", "state") else "right")
        for job in self._jobs:
            step, reward = _newest(job)
            table.add_row(job.name, job.state, step, reward, str(job.lost or ""))
        return table


class _NoLive:
    """In place of rich's Live where there is no terminal."""

    def __enter__(self) -> _NoLive:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: Any) -> None:
        pass


def _is_ended_arm(job: Job) -> bool:
    return (
        job.arm is not None and job.config is not None and has_ended(job.study, job.arm, job.config)
    )


def _newest(job: Job) -> tuple[str, str]:
    """Step and reward of a job's last record, from the end of its metrics."""
    if job.config is None:
        return "", ""
    path = RunDirectory(Path(job.config.run_dir)).metrics
    if not path.is_file():
        return "", ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if "reward" in record:
                return f"{record['step']}/{job.config.steps}", f"{record['reward']:.3f}"
    return "", ""

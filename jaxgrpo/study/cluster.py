"""Arms as Ray tasks, or as JaxTrainer runs where an arm spans hosts.

A worker that is lost (killed, preempted, its node gone) loses nothing but the steps since its arm's
last checkpoint: the arm is started again elsewhere and goes on from there. Files are the only thing
that workers share, so run_dir must be on a file system that all nodes see.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from jaxgrpo.config import ConfigError
from jaxgrpo.config_files import decode_config, dump_config, encode_config
from jaxgrpo.records.run_directory import RunDirectory, atomic_write_text
from jaxgrpo.study.config import StudyConfig, StudyFiles, list_arms
from jaxgrpo.study.runs import arm_configs, check_same_study, is_done

POLL_S = 1.0
PREPARE = -1
"""In place of an arm's number: what all arms build on."""


@dataclass
class Job:
    """A study's preparation or one of its arms.

    Attributes:
        state: waiting, running, done or failed.
        lost: how many workers it has lost.
    """

    study: StudyConfig
    number: int
    name: str
    run_dir: Path | None
    steps: int
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
    _connect(settings)
    with contextlib.ExitStack() as held:
        for study in studies:
            check_same_study(study)
            root = RunDirectory(StudyFiles(study.run_dir).root)
            root.root.mkdir(parents=True, exist_ok=True)
            held.enter_context(root.lock())
            atomic_write_text(root.config, dump_config(study))
        try:
            failed = _Board(settings, studies, console).run()
        finally:
            ray.shutdown()
    if failed:
        job = failed[0]
        raise OSError(f"{len(failed)} of the sweep's runs failed, first {job.name}: {job.reason}")


def _connect(settings: Any) -> None:
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
    for name, each in (("CPU", settings.cpus), ("GPU", settings.gpus), ("TPU", settings.tpus)):
        if each * settings.hosts > there.get(name, 0):
            ray.shutdown()
            raise ConfigError(
                f"sweep: an arm needs {each * settings.hosts:g} {name}, the cluster has "
                f"{there.get(name, 0):g}"
            )


class _Board:
    """Starts jobs, watches them, starts lost ones again, and shows where they are."""

    def __init__(self, settings: Any, studies: list[StudyConfig], console: Console) -> None:
        self._settings, self._console = settings, console
        self._jobs: list[Job] = []
        self._running: dict[Any, Job] = {}
        for study in studies:
            name = Path(study.run_dir).name
            self._jobs.append(Job(study, PREPARE, f"{name}: profiles and plans", None, 0))
            configs = arm_configs(study)
            for number, (arm, config) in enumerate(zip(list_arms(study), configs, strict=True)):
                run_dir = Path(config.run_dir)
                job = Job(study, number, f"{name}: {arm.name}", run_dir, config.steps)
                self._jobs.append(job)

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
        prepared = {
            id(job.study) for job in self._jobs if job.number == PREPARE and job.state == "done"
        }
        for job in self._jobs:
            if job.state == "waiting" and (job.number == PREPARE or id(job.study) in prepared):
                if job.number != PREPARE and is_done(arm_configs(job.study)[job.number]):
                    job.state = "done"
                    continue
                job.state = "running"
                self._running[self._start(job)] = job

    def _start(self, job: Job) -> Any:
        settings = self._settings
        raw = json.dumps(encode_config(job.study))
        if settings.hosts > 1:
            task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(run_over_hosts)
            return task.remote(raw, job.number, settings)
        resources = {"TPU": settings.tpus} if settings.tpus else {}
        task = ray.remote(
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            resources=resources,
            max_retries=0,
            # A worker keeps an accelerator's memory until it ends.
            max_calls=1,
        )(run_part)
        return task.remote(raw, job.number)

    def _finish(self, ref: Any, job: Job) -> None:
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
        kind, job.reason = outcome
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


def _newest(job: Job) -> tuple[str, str]:
    """Step and reward of a job's last record, from the end of its metrics."""
    path = None if job.run_dir is None else RunDirectory(job.run_dir).metrics
    if path is None or not path.is_file():
        return "", ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if "reward" in record:
                return f"{record['step']}/{job.steps}", f"{record['reward']:.3f}"
    return "", ""


def run_part(raw: str, number: int, logs: bool = True) -> tuple[str, str]:
    """In a worker: one job of a study; gives ("done" | "lost" | "failed", why)."""
    from jaxgrpo.records.run_directory import DivergedError
    from jaxgrpo.study.arms import Runner
    from jaxgrpo.study.config import Interrupted

    study: StudyConfig = decode_config(json.loads(raw), StudyConfig)
    log = StudyFiles(study.run_dir).root / "logs"
    log.mkdir(exist_ok=True)
    name = "prepare" if number == PREPARE else list_arms(study)[number].name
    with (log / f"{name}.txt").open("a", encoding="utf-8") as file:
        runner = Runner(study, Console(file=file, width=100, quiet=not logs))
        try:
            runner.prepare() if number == PREPARE else runner.arm(number)
        except Interrupted:  # the node is being taken away; what was running is saved
            return "lost", "interrupted"
        except (ConfigError, OSError, DivergedError) as error:
            return "failed", str(error)
    return "done", ""


def run_over_hosts(raw: str, number: int, settings: Any) -> tuple[str, str]:
    """The same over several processes, which Ray Train starts together and starts again together
    when one of them is lost."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    study: StudyConfig = decode_config(json.loads(raw), StudyConfig)
    each = {"CPU": settings.cpus, "GPU": settings.gpus, "TPU": settings.tpus}
    trainer = JaxTrainer(
        _train_loop,
        train_loop_config={"raw": raw, "number": number},
        scaling_config=ScalingConfig(
            num_workers=settings.hosts,
            use_tpu=settings.tpus > 0,
            use_gpu=settings.gpus > 0,
            topology=settings.tpu_topology,
            accelerator_type=settings.tpu_type,
            resources_per_worker={name: n for name, n in each.items() if n},
        ),
        run_config=RunConfig(
            name=f"part-{number}",
            storage_path=str(StudyFiles(study.run_dir).root / "ray"),
            failure_config=FailureConfig(max_failures=settings.retries),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        return "failed", (str(error).splitlines() or [type(error).__name__])[-1]
    return "done", ""


def _train_loop(given: dict) -> None:
    """In every worker of a JaxTrainer."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    import jax

    if not jax.distributed.is_initialized():  # Ray does so for TPUs and GPUs alone
        address = broadcast_from_rank_zero(_free_address())
        os.environ["JAX_COORDINATOR_ADDRESS"] = address
        os.environ["JAX_NUM_PROCESSES"] = str(context.get_world_size())
        os.environ["JAX_PROCESS_ID"] = str(context.get_world_rank())
    from jaxgrpo.processes import joined

    with joined() as first:
        outcome, reason = run_part(given["raw"], given["number"], first)
    if outcome != "done":
        raise RuntimeError(reason)


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"

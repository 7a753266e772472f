"""What a sweep's tasks do in Ray's workers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

import ray
from rich.console import Console

from jaxgrpo.config import ConfigError
from jaxgrpo.config_files import decode_config
from jaxgrpo.records.run_directory import DivergedError, atomic_write_json
from jaxgrpo.study.arms import Runner
from jaxgrpo.study.config import Interrupted, StudyConfig, StudyFiles, list_arms

PREPARE = -1
"""In place of an arm's number: what all arms build on."""


def run_part(raw: str, numbers: Sequence[int], places: int, first: bool = True) -> tuple[str, str]:
    """A study's preparation, with the rounds that its arms are trained in, or the arms of one.

    Args:
        numbers: of `list_arms`, or PREPARE.
        places: how many tasks the cluster can run at the same time.
        first: this is the process of the task that writes.

    Returns:
        "done", "lost" or "failed", and why.
    """
    study: StudyConfig = decode_config(json.loads(raw), StudyConfig)
    files, arms = StudyFiles(study.run_dir), list_arms(study)
    log = files.root / "logs"
    log.mkdir(exist_ok=True)
    name = "prepare" if PREPARE in numbers else arms[numbers[0]].name
    with (log / f"{name}.txt").open("a", encoding="utf-8") as file:
        runner = Runner(study, Console(file=file, width=100, quiet=not first))
        try:
            if PREPARE in numbers:
                runner.prepare()
                rounds = runner.rounds(range(len(arms)), places)
                if first:
                    atomic_write_json(files.rounds, [group.numbers for group in rounds])
            else:
                runner.train(numbers)
        except Interrupted:  # the node is being taken away; what was running is saved
            return "lost", "interrupted"
        except (ConfigError, OSError, DivergedError) as error:
            return "failed", str(error)
    return "done", ""


def run_over_hosts(raw: str, numbers: Sequence[int], places: int, settings: Any) -> tuple[str, str]:
    """The same over several processes, which Ray Train starts together and starts again together
    when one of them is lost."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    study: StudyConfig = decode_config(json.loads(raw), StudyConfig)
    each = {"CPU": settings.cpus, "GPU": settings.gpus, "TPU": settings.tpus}
    trainer = JaxTrainer(
        _train_loop,
        train_loop_config={"raw": raw, "numbers": numbers, "places": places},
        scaling_config=ScalingConfig(
            num_workers=settings.hosts,
            use_tpu=settings.tpus > 0,
            use_gpu=settings.gpus > 0,
            topology=settings.tpu_topology,
            accelerator_type=settings.tpu_type,
            resources_per_worker={name: n for name, n in each.items() if n},
        ),
        run_config=RunConfig(
            name=f"part-{numbers[0]}",
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
        outcome, reason = run_part(given["raw"], given["numbers"], given["places"], first)
    if outcome != "done":
        raise RuntimeError(reason)


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"

"""Starts a command as a job of several real processes on this machine."""

import os
import socket
import subprocess
import sys
import time

from tests.quick_compiles import quick_flags

SMALL = [
    "grpo.prompts_per_step=8",
    "grpo.group_size=4",
    "grpo.micro_batches=1",
    "lora.rank=4",
    "rollout.max_completion_tokens=16",
    "eval.before_training=false",
    "eval.after_training=false",
    "log_completions_every_steps=0",
    "optim.learning_rate=0.01",
]


def environment(devices):
    """Of a process with so many CPU devices, in no job."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_"))}
    flags = f"{quick_flags()} --xla_force_host_platform_device_count={devices}"
    return kept | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


def start_job(count, words, log, code=None):
    """Popen objects of `count` processes with one device each, output in log_<i>.txt."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    job = []
    for index in range(count):
        env = environment(1) | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        start = ["-m", "jaxgrpo.run"] if code is None else ["-c", code]
        with (log / f"log_{index}.txt").open("w") as out:
            command = [sys.executable, *start, *words]
            job.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    return job


def wait(job, seconds):
    """Their exit codes; whoever is late is killed and has None."""
    deadline = time.monotonic() + seconds
    codes = []
    for process in job:
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(None)
    return codes

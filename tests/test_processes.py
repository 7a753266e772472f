"""Jobs of several real processes: they compute what one does, and end together."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxgrpo.config import ConfigError
from jaxgrpo.processes import LOST_S, find_job
from jaxgrpo.records.run_directory import read_jsonl
from tests.processes import SMALL, environment, start_job, wait

pytestmark = pytest.mark.multihost
TIMES = ("time", "throughput/", "step_time")


def metrics(run_dir):
    records = read_jsonl(run_dir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in records]


def check_same_run(one, other):
    """Same tokens and rewards; losses, norms and adapters to float32's rounding of another order
    of addition."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    for name in ("step_000001.jsonl", "step_000003.jsonl"):
        ours, theirs = (read_jsonl(run / "completions" / name) for run in (one, other))
        assert [r["completion"] for r in ours] == [r["completion"] for r in theirs]
        assert [r["rewards"] for r in ours] == [r["rewards"] for r in theirs]
    ours, theirs = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)
    )
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_job_of_processes_trains_as_one_process_does(tmp_path, count):
    words = ["train", *SMALL, f"mesh.data={count}", "steps=3"]
    alone = subprocess.Popen(
        [sys.executable, "-m", "jaxgrpo.run", *words, f"run_dir={tmp_path / 'one'}"],
        env=environment(count),
        stdout=subprocess.DEVNULL,
    )
    assert alone.wait(300) == 0
    job = start_job(count, [*words, f"run_dir={tmp_path / 'job'}"], tmp_path)
    assert wait(job, 300) == [0] * count, (tmp_path / "log_0.txt").read_text()
    check_same_run(tmp_path / "one", tmp_path / "job")
    # Only the first one speaks, and the library that connects them.
    said = (tmp_path / "log_1.txt").read_text().splitlines()
    assert not [line for line in said if "[Gloo]" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_job_resumes(tmp_path, victim):
    run_dir = tmp_path / "job"
    words = ["train", *SMALL, "mesh.data=2", f"run_dir={run_dir}", "checkpoint_every_steps=2"]
    job = start_job(2, [*words, "steps=400"], tmp_path)
    deadline = time.monotonic() + 240
    while not (run_dir / "checkpoints" / "2").is_dir():
        assert all(process.poll() is None for process in job), (tmp_path / "log_0.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job[victim].send_signal(signal.SIGKILL)
    before = time.monotonic()
    survivor = 1 - victim
    assert job[survivor].wait(60) not in (0, None)
    assert time.monotonic() - before < 60
    # What a process can no longer say is said for it, a moment later.
    log, deadline = tmp_path / f"log_{survivor}.txt", time.monotonic() + 10
    while (said := log.read_text()).count("start the job again") == 0:
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    assert "the last checkpoint is kept: start the job again" in said
    assert f"process {victim} " in said and "Traceback" not in said
    steps = [int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()]
    again = start_job(2, [*words, f"steps={max(steps) + 2}"], tmp_path)
    assert wait(again, 240) == [0, 0], (tmp_path / "log_0.txt").read_text()
    assert "resuming" in (tmp_path / "log_0.txt").read_text()


ARMS = """
import dataclasses, itertools, sys
import jax
from rich.console import Console
from jaxgrpo.config_files import load_config
from jaxgrpo.processes import joined
from jaxgrpo.programs import make_programs
from jaxgrpo.run import EMBEDDED_CONFIG
from jaxgrpo.session import open_session
from jaxgrpo.train import train_arms

fails, *words = sys.argv[1:]
calls = itertools.count(1)

def reward(completions, answers, **context):
    # Of the second arm in the second step, on the second process.
    if next(calls) == 4 and fails == "fails" and jax.process_index() == 1:
        raise ArithmeticError("of one arm")
    return [float(len(text)) for text in completions]

with joined():
    session = open_session(load_config([EMBEDDED_CONFIG], words))
    session = dataclasses.replace(session, rewards={"gsm8k_answer": reward})
    config = session.config
    arms = [
        session.with_config(
            dataclasses.replace(config, seed=seed, run_dir=f"{config.run_dir}/{seed}")
        )
        for seed in (0, 1)
    ]
    with jax.set_mesh(session.mesh):
        for result in train_arms(arms, make_programs(session, 2), Console(quiet=True)):
            if isinstance(result, Exception):
                raise result
"""


@pytest.mark.slow
def test_arms_in_a_job_of_processes_are_trained_as_in_one_process(tmp_path):
    words = ["works", *SMALL, "mesh.data=2", "steps=3"]
    alone = subprocess.Popen(
        [sys.executable, "-c", ARMS, *words, f"run_dir={tmp_path / 'one'}"], env=environment(2)
    )
    assert alone.wait(300) == 0
    job = start_job(2, [*words, f"run_dir={tmp_path / 'job'}"], tmp_path, ARMS)
    assert wait(job, 300) == [0, 0], (tmp_path / "log_0.txt").read_text()
    for arm in ("0", "1"):
        check_same_run(tmp_path / "one" / arm, tmp_path / "job" / arm)


@pytest.mark.slow
def test_an_arm_that_fails_on_one_process_ends_the_job(tmp_path):
    words = ["fails", *SMALL, "mesh.data=2", "steps=3", f"run_dir={tmp_path / 'job'}"]
    job = start_job(2, words, tmp_path, ARMS)
    codes = wait(job, 200)
    assert 0 not in codes and None not in codes, codes
    assert "of one arm" in (tmp_path / "log_0.txt").read_text()


def test_what_the_environment_says_of_a_job():
    three = {
        "JAX_COORDINATOR_ADDRESS": "host:1234",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
        "JAX_PLATFORMS": "cpu",
    }
    assert find_job({"JAX_PLATFORMS": "cpu"}) is None
    assert find_job(three | {"JAX_NUM_PROCESSES": "1"}) is None
    found = find_job(three)
    assert found is not None and (found["num_processes"], found["process_id"]) == (2, 1)
    assert find_job({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) == {}
    assert find_job({"OMPI_COMM_WORLD_SIZE": "4"}) == {}
    assert find_job({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    assert LOST_S < 60
    for name, value, message in (
        ("JAX_PROCESS_ID", "", "JAX_PROCESS_ID must be set too"),
        ("JAX_PROCESS_ID", "2", "below JAX_NUM_PROCESSES"),
        ("JAX_COORDINATOR_ADDRESS", "host", "not HOST:PORT"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_job(three | {name: value})

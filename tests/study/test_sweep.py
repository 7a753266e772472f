"""Sweeps: what is refused, what a study per model comes to, and arms on a local Ray cluster."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxgrpo.config import ConfigError
from jaxgrpo.config_files import load_config
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.study.config import list_arms
from jaxgrpo.study.sweep import SweepConfig, run_sweep
from tests.processes import environment

SMALL = [
    "data.max_prompt_tokens=56",
    "data.prompt_bucket_tokens=56",
    "grpo.prompts_per_step=4",
    "grpo.group_size=4",
    "rollout.max_completion_tokens=16",
    "lora.rank=4",
    "steps=30",
    "checkpoint_every_steps=5",
    "log_completions_every_steps=0",
    "eval.problems=16",
    "eval.batch_prompts=16",
    "optim.learning_rate=0.01",
    "study.profile.objectives=[grpo]",
    "study.profile.steps=4",
    "study.probe.scale_rules=[]",
    "study.arms.plans=[uniform,proportional,random]",
    "study.arms.seeds=[0,1]",
]


def start(run_dir, *words):
    command = [sys.executable, "-m", "jaxgrpo.run", "sweep", str(run_dir / "sweep.yaml")]
    run_dir.mkdir()
    (run_dir / "sweep.yaml").write_text("{}\n")
    out = (run_dir / "out.txt").open("w")
    settings = [*SMALL, f"run_dir={run_dir / 'study'}", *words]
    return subprocess.Popen([*command, *settings], env=environment(1), stdout=out, stderr=out)


def numbers(run_dir):
    """The results without what depends on where and how fast they were made."""
    results = json.loads((run_dir / "study" / "results.json").read_text())
    for arm in results["arms"]:
        for name in ("seconds", "tokens_per_s"):
            del arm[name]
    return json.loads(json.dumps(results).replace(str(run_dir), "RUN"))


def losses(arm):
    return [r["loss"] for r in read_jsonl(arm / "metrics.jsonl") if "loss" in r]


def test_a_sweep_is_one_study_per_model(tmp_path):
    settings = [*SMALL, f"run_dir={tmp_path}", "sweep.models=[Qwen/Qwen2.5-0.5B,embedded]"]
    studies = load_config([], settings, SweepConfig).studies()
    assert [study.model.path for study in studies] == ["Qwen/Qwen2.5-0.5B", "embedded"]
    assert [study.run_dir for study in studies] == [
        str(tmp_path / "Qwen2.5-0.5B"),
        str(tmp_path / "embedded"),
    ]
    assert all(len(list_arms(study)) == 6 for study in studies)
    (alone,) = load_config([], [f"run_dir={tmp_path}"], SweepConfig).studies()
    assert alone.run_dir == str(tmp_path)


def test_the_paths_of_a_sweep_hold_wherever_a_worker_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "data", "embedded"):
        (tmp_path / name).mkdir()
    words = ["run_dir=out", "model.path=model", "data.path=data"]
    (study,) = load_config([], words, SweepConfig).studies()
    found = (study.run_dir, study.model.path, study.data.path)
    assert found == tuple(str(tmp_path / n) for n in ("out", "model", "data"))
    (study,) = load_config([], [], SweepConfig).studies()
    assert (study.model.path, study.data.path) == ("embedded", "embedded")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.hosts=0"], "sweep.hosts must be at least 1"),
        (["sweep.cpus=-1"], "sweep.cpus must be >= 0"),
        (["sweep.tpu_type=TPU-V6E"], "go together"),
        (["sweep.models=[a/x,b/x]"], "the same name"),
        (["sweep.engine=slurm"], "sweep.engine"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config([], words, SweepConfig)


def test_without_ray_an_arm_over_hosts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for words, message in (
        (["sweep.hosts=2"], "needs Ray"),
        (["sweep.engine=ray"], "Ray is not installed"),
    ):
        config = load_config([], [f"run_dir={tmp_path}", *words], SweepConfig)
        with pytest.raises(ConfigError, match=message):
            run_sweep(config, None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize("together", [1, 3])
def test_a_sweep_with_a_killed_worker_equals_the_sequential_one(tmp_path, together):
    pytest.importorskip("ray")
    words = [f"study.together={together}"]
    sweep = start(tmp_path / "ray", "sweep.engine=ray", *words)
    arms = tmp_path / "ray" / "study" / "arms"
    deadline = time.monotonic() + 500
    victim = None
    while victim is None:
        assert sweep.poll() is None, (tmp_path / "ray" / "out.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
        for arm in arms.glob("*"):
            log, saved = arm / "metrics.jsonl", (arm / "checkpoints" / "10").is_dir()
            done = (arm / "checkpoints" / "30").is_dir()
            if saved and not done and log.exists() and len(log.read_text().splitlines()) >= 10:
                victim = arm
                break
    os.kill(int((victim / ".lock").read_text().split()[1]), signal.SIGKILL)
    assert sweep.wait(1800) == 0, (tmp_path / "ray" / "out.txt").read_text()
    said = (tmp_path / "ray" / "out.txt").read_text()
    assert said.count("its worker was lost; starting it again") == together
    # The first arm of a task speaks.
    logs = tmp_path / "ray" / "study" / "logs"
    assert sum("resuming" in log.read_text() for log in logs.iterdir()) == 1
    assert len(list(logs.iterdir())) == 1 + 6 // together
    steps = [r["step"] for r in read_jsonl(victim / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 31))
    sequential = start(tmp_path / "alone", "sweep.engine=sequential", *words)
    assert sequential.wait(1800) == 0, (tmp_path / "alone" / "out.txt").read_text()
    assert numbers(tmp_path / "ray") == numbers(tmp_path / "alone")
    for arm in arms.iterdir():
        there = tmp_path / "alone" / "study" / "arms" / arm.name
        assert losses(arm) == losses(there), arm.name


@pytest.mark.slow
@pytest.mark.multihost
def test_arms_over_two_workers_have_the_losses_of_one_process(tmp_path):
    pytest.importorskip("ray")
    few = ["study.arms.plans=[uniform]", "study.arms.seeds=[0,1]", "study.together=2", "steps=4"]
    for name, words in (("two", ["sweep.engine=ray", "sweep.hosts=2"]), ("one", [])):
        words = [*few, *words, *(["sweep.engine=sequential"] if name == "one" else [])]
        process = start(tmp_path / name, *words)
        assert process.wait(600) == 0, (tmp_path / name / "out.txt").read_text()
    for arm in ("uniform-r4-s0", "uniform-r4-s1"):
        many, one = (losses(tmp_path / name / "study" / "arms" / arm) for name in ("two", "one"))
        assert many == pytest.approx(one, rel=1e-4, abs=1e-6)
        assert len(many) == 4

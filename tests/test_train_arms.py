"""Arms that share their steps: each is what it would be alone."""

import dataclasses
import json
import math
import os
import signal

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

from jaxgrpo.checkpoint import read_adapter
from jaxgrpo.config import ConfigError
from jaxgrpo.config_files import load_config
from jaxgrpo.loop import TrainResult
from jaxgrpo.programs import make_programs
from jaxgrpo.records.run_directory import RunDirectory, read_jsonl
from jaxgrpo.run import EMBEDDED_CONFIG
from jaxgrpo.session import open_session
from jaxgrpo.tasks.rewards import gsm8k_answer_reward
from jaxgrpo.train import train_arms, train_session
from tests.compiled import compilations
from tests.devices import few_devices
from tests.gradients import assert_close_in_size

SETTINGS = ["grpo.prompts_per_step=4", "grpo.group_size=4", "rollout.max_completion_tokens=16"]
SETTINGS += ["lora.rank=3", "lora.alpha=6", "steps=3", "eval.problems=8", "eval.batch_prompts=8"]
SETTINGS += ["eval.before_training=false", "optim.schedule=linear", "checkpoint_every_steps=2"]
# With Adam's usual 1e-8 an update is nearly the gradient's sign, and shows the rounding of one that
# is near 0; so it goes with the gradient's size, and can be compared closely.
SETTINGS += ["optim.eps=1e-3"]
QUIET = Console(quiet=True)

PLANS = {
    "uniform": None,
    "unequal": [1, 2, 3, 3, 4, 5, 4, 2],
    "some layers without": [0, 6, 0, 6, 6, 0, 3, 3],
    "faster": None,
}


class Lab:
    """One open model, the programs of one run, and those of up to five arms."""

    def __init__(self, plans, *words, devices=1):
        given = [*SETTINGS, "run_dir=unused", "lora.max_rank=6", *words]
        config = load_config([EMBEDDED_CONFIG], given)
        with few_devices(devices):
            session = open_session(config)
        self.plans, self.at = plans, {}
        self.session = dataclasses.replace(session, rewards={"gsm8k_answer": self.reward})
        self.alone, self.together = make_programs(self.session), make_programs(self.session, 5)

    def reward(self, completions, answers, **context):
        if action := self.at.get(tuple(context["prompts"])):
            action()
        return gsm8k_answer_reward(completions, answers)

    def arm(self, name, root, **changes):
        """An arm of PLANS in root/NAME; each has a seed of its own."""
        config = self.session.config
        number = list(PLANS).index(name)
        lora, optim = config.lora, config.optim
        if PLANS[name] is not None:
            lora = dataclasses.replace(lora, plan=str(self.plans / f"{number}.json"))
        if name == "faster":
            optim = dataclasses.replace(optim, learning_rate=3e-3)
        changes = {"seed": number, "lora": lora, "optim": optim, **changes}
        return self.session.with_config(
            dataclasses.replace(config, run_dir=str(root / name), **changes)
        )

    def prompts(self, session, step):
        """What the reward sees of a step."""
        config = session.config
        found = session.train_prompts.batch(config.seed, step, config.grpo.prompts_per_step)
        return tuple(text for text in found.texts for _ in range(config.grpo.group_size))

    def run(self, sessions):
        with jax.set_mesh(self.session.mesh):
            return train_arms(sessions, self.together, QUIET)

    def run_interrupted(self, sessions, at):
        """`run` with Ctrl-C in the reward of one of them, at its second step."""
        self.at = {self.prompts(at, 1): lambda: os.kill(os.getpid(), signal.SIGINT)}
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            results = self.run(sessions)
        finally:
            signal.signal(signal.SIGINT, before)
            self.at = {}
        assert all(isinstance(r, TrainResult) and r.interrupted for r in results)

    def run_alone(self, names, root):
        """Every arm by itself, in the ordinary programs."""
        with jax.set_mesh(self.session.mesh):
            for name in names:
                session = self.arm(name, root)
                # The learning rate is part of a single run's programs.
                programs = make_programs(session) if name == "faster" else self.alone
                train_session(session, programs, QUIET)
        return root


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    plans = tmp_path_factory.mktemp("plans")
    for number, ranks in enumerate(PLANS.values()):
        (plans / f"{number}.json").write_text(json.dumps({"ranks": ranks}))
    return plans


@pytest.fixture(scope="module")
def lab(plans):
    return Lab(plans)


@pytest.fixture(scope="module")
def alone(lab, tmp_path_factory):
    return lab.run_alone(PLANS, tmp_path_factory.mktemp("alone"))


def steps(run):
    return [m for m in read_jsonl(run / "metrics.jsonl") if "loss" in m]


def assert_same_run(run, other):
    """Tokens exactly; losses, norms and adapters within 1e-5 of their size."""
    for file in sorted((other / "completions").iterdir()):
        mine, theirs = read_jsonl(run / "completions" / file.name), read_jsonl(file)
        names = ("completion", "tokens", "finish_reason", "reward", "problem")
        assert [[row[n] for n in names] for row in mine] == [[r[n] for n in names] for r in theirs]
    for mine, theirs in zip(steps(run), steps(other), strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "reward", "entropy", "packing/bins"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    norms = [read_jsonl(path / "layer_grad_norms.jsonl") for path in (run, other)]
    chex.assert_trees_all_close(*norms, rtol=2e-4, atol=1e-6)
    saved = [read_adapter(RunDirectory(path).checkpoints) for path in (run, other)]
    assert saved[0].step == saved[1].step
    assert_close_in_size(*(x.lora for x in saved))


def test_four_arms_together_are_four_runs(lab, alone, tmp_path):
    results = lab.run([lab.arm(name, tmp_path) for name in PLANS])
    for name, result in zip(PLANS, results, strict=True):
        assert isinstance(result, TrainResult) and not result.interrupted
        assert_same_run(tmp_path / name, alone / name)
        theirs = json.loads((alone / name / "summary.json").read_text())["eval_after"]
        assert result.after is not None and result.after.metrics == theirs


def test_fewer_arms_and_other_plans_compile_nothing(lab, alone, tmp_path):
    lab.run([lab.arm(name, tmp_path) for name in PLANS])
    again = tmp_path / "again"
    with compilations() as compiled:
        results = lab.run([lab.arm("faster", again), lab.arm("some layers without", again)])
    assert not any(isinstance(result, Exception) for result in results)
    assert not compiled
    for name in ("faster", "some layers without"):
        assert_same_run(again / name, alone / name)


def test_one_arm_that_fails_does_not_stop_the_others(lab, alone, tmp_path):
    arms = {name: lab.arm(name, tmp_path) for name in PLANS}

    def fail():
        raise ArithmeticError("of this arm alone")

    lab.at = {lab.prompts(arms["unequal"], 2): fail}
    try:
        results = dict(zip(PLANS, lab.run(list(arms.values())), strict=True))
    finally:
        lab.at = {}
    error = results.pop("unequal")
    assert isinstance(error, ConfigError) and "of this arm alone" in str(error)
    for name in results:
        assert_same_run(tmp_path / name, alone / name)
    # What it had is saved, and goes on beside another one that is at another step.
    saved = read_adapter(RunDirectory(tmp_path / "unequal").checkpoints)
    assert saved is not None and saved.step == 2
    later = tmp_path / "later"
    lab.run([lab.arm("unequal", tmp_path), lab.arm("faster", later)])
    assert_same_run(tmp_path / "unequal", alone / "unequal")
    assert_same_run(later / "faster", alone / "faster")


def test_arms_that_are_interrupted_go_on_to_the_same_numbers(lab, alone, tmp_path):
    arms = [lab.arm(name, tmp_path) for name in PLANS]
    lab.run_interrupted(arms, at=arms[0])
    assert [len(steps(tmp_path / name)) for name in PLANS] == [2] * len(PLANS)
    lab.run([lab.arm(name, tmp_path) for name in PLANS])
    for name in PLANS:
        assert_same_run(tmp_path / name, alone / name)


@pytest.mark.parametrize(
    "words", [["objective=sft"], ["grpo.num_iterations=2", "grpo.kl_coef=0.1"]]
)
def test_other_objectives_too(lab, tmp_path, words):
    config = load_config(
        [EMBEDDED_CONFIG], [*SETTINGS, *words, "lora.max_rank=6", "eval.after_training=false"]
    )
    changes = {name: getattr(config, name) for name in ("objective", "grpo", "eval")}
    found = []
    for arms in (1, 2):
        sessions = [
            lab.arm(name, tmp_path / str(arms), steps=2, **changes)
            for name in ("uniform", "unequal")
        ]
        programs = make_programs(sessions[0], arms)
        with jax.set_mesh(lab.session.mesh):
            if arms == 2:
                assert not any(
                    isinstance(r, Exception) for r in train_arms(sessions, programs, QUIET)
                )
            else:
                for session in sessions:
                    train_session(session, programs, QUIET)
        found.append([steps(tmp_path / str(arms) / name) for name in ("uniform", "unequal")])
    for alone, together in zip(*found, strict=True):
        for a, b in zip(alone, together, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5, abs=1e-6)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-5, abs=1e-6)
            assert np.isfinite(b["loss"])


@pytest.fixture(scope="module")
def spread(plans):
    """Two devices, three arms on each at most."""
    return Lab(plans, "mesh.data=2", "eval.after_training=false", devices=2)


def test_arms_spread_over_devices_are_what_they_are_alone_on_one(spread, alone, tmp_path):
    """Interrupted once; what a step leaves lies where the next one wants it, and fewer arms of
    other plans compile nothing."""
    assert spread.together.arms == 6
    arms = [spread.arm(name, tmp_path) for name in PLANS]
    spread.run_interrupted(arms, at=arms[0])
    spread.run(arms)
    for name in PLANS:
        assert_same_run(tmp_path / name, alone / name)
    again = tmp_path / "again"
    with compilations() as compiled:
        spread.run([spread.arm("faster", again)])
    assert not compiled
    assert_same_run(again / "faster", alone / "faster")


@pytest.mark.parametrize(
    ("mesh", "names"),
    [
        pytest.param({"data": 1, "fsdp": 2}, ["uniform", "unequal"], marks=pytest.mark.slow),
        pytest.param({"data": 1, "model": 2}, ["uniform", "unequal"], marks=pytest.mark.slow),
        pytest.param(
            {"data": 2, "fsdp": 2, "model": 2}, ["uniform", "faster"], marks=pytest.mark.slow
        ),
    ],
    ids=["fsdp", "model", "all"],
)
def test_arms_on_split_weights_are_what_they_are_alone_on_them(plans, tmp_path, mesh, names):
    words = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    lab = Lab(plans, *words, "eval.after_training=false", devices=math.prod(mesh.values()))
    together, alone = tmp_path / "together", lab.run_alone(names, tmp_path / "alone")
    results = lab.run([lab.arm(name, together) for name in names])
    assert not any(isinstance(result, Exception) for result in results)
    for name in names:
        assert_same_run(together / name, alone / name)
        # What a step leaves lies where the next one wants it.
        assert [m["time/programs_compiled"] for m in steps(together / name)[1:]] == [0, 0]

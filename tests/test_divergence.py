"""The guard over a run's steps, on steps made by hand; e2e/test_failures.py has whole runs."""

import io
import math

from rich.console import Console

from jaxgrpo.divergence import DivergenceGuard
from jaxgrpo.records.run_directory import RunDirectory
from jaxgrpo.step_records import StepResult


def said(tmp_path, rewards):
    """What the guard prints over steps with these mean rewards."""
    console = Console(file=io.StringIO(), width=200)
    guard = DivergenceGuard(RunDirectory(tmp_path))
    for step, reward in enumerate(rewards, start=1):
        metrics = {"loss": 0.0, "grpo/skipped_updates": 0.0, "reward": reward}
        assert not guard.check(step, StepResult(metrics, {}, [], None), console)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_without_any_reward_says_so_once(tmp_path):
    text = said(tmp_path, [0.5, math.nan, math.nan])
    assert text.count("warning") == 1
    assert "step 2: every reward function gave None for every completion" in text


def test_rewards_of_zero_are_rewards(tmp_path):
    assert said(tmp_path, [0.0, 0.0]) == ""

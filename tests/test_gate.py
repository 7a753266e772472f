"""scripts/gate_figures.py: what it reads from a run, and what its exit code says."""

import importlib.util
import json
import math

import numpy as np
import pytest

from jaxgrpo.model.weights import EMBEDDED_DIR, weights_sha256
from jaxgrpo.records.run_directory import RunDirectory
from tests.test_layout import ROOT

SPEC = importlib.util.spec_from_file_location("gate", ROOT / "scripts" / "gate_figures.py")
assert SPEC is not None and SPEC.loader is not None
gate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gate)


@pytest.fixture
def run(tmp_path):
    """A run of 12 steps whose reward is 0, 1, ... 11, and an evaluation after it."""
    directory = RunDirectory(tmp_path / "run")
    directory.summary.parent.mkdir(parents=True)
    directory.summary.write_text(json.dumps({"eval_after": {"eval/accuracy": 0.75}}))
    rows = [{"step": 0, "eval/accuracy": 0.5}]
    for step in range(12):
        row = {"step": step + 1, "reward": float(step), "completions/mean_length": 200.0}
        rows.append(row | {"sampling/sampling_logp_difference/mean": 0.005})
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


FIGURES = {
    "accuracy_after": 0.75,
    "last_rewards": 6.5,
    "mean_completion_length": 200.0,
    "sampler_difference": 0.005,
}


def test_the_figures_are_of_the_last_ten_steps_and_of_the_last_evaluation(run):
    assert gate.read_figures(run) == pytest.approx(FIGURES)


SHA256 = weights_sha256(EMBEDDED_DIR)
RUNS = {
    "accuracy_after": [0.73, 0.75, 0.77],
    "last_rewards": [6.0, 6.5, 7.0],
    "mean_completion_length": [190.0, 200.0, 210.0],
    "sampler_difference": [0.004, 0.005, 0.006],
}


def bounds(runs=RUNS, sha256=SHA256):
    return {"ours": {"weights_sha256": sha256, "measured": "here", "runs": runs}}


@pytest.mark.parametrize(
    ("kept", "code", "said"),
    [
        (bounds(), 0, "within: at least 0.5892 (3 runs, mean 0.75, sd 0.02)"),
        (bounds(RUNS | {"sampler_difference": [0.001, 0.0011]}), 1, "OUTSIDE"),
        (bounds(RUNS | {"last_rewards": [1.0, 2.0, 3.0]}), 0, "is passed"),
        ({}, 3, f"no runs of the weights {SHA256}"),
        (bounds(sha256="0" * 64), 3, f"no runs of the weights {SHA256}"),
        (bounds({"acuracy": [1.0, 2.0]}), 2, "needs runs of accuracy_after"),
        (bounds(RUNS | {"last_rewards": [6.5]}), 2, "at least two runs"),
    ],
)
def test_the_exit_code_tells_whether_all_figures_lie_within(
    run, tmp_path, capsys, kept, code, said
):
    path = tmp_path / "bounds.json"
    path.write_text(json.dumps(kept))
    assert gate.main([str(run), "embedded", str(path)]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_bounds_hold_one_more_run_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(size=(4000, 4))
    for faults in ("low", "high", "low or high"):
        low, high = np.array([gate.bounds_of(row[:3], faults) for row in draws]).T
        held = np.mean((low <= draws[:, 3]) & (draws[:, 3] <= high))
        assert abs(held - gate.CONFIDENCE) < 0.006, (faults, held)


def test_a_figure_that_is_no_number_is_outside():
    assert not gate.judge({"last_rewards": math.nan}, RUNS)[1]


def test_a_run_that_has_not_finished_is_no_run(tmp_path, capsys):
    kept = str(ROOT / "scripts" / "gate_bounds.json")
    assert gate.main([str(tmp_path), "embedded", kept]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_kept_runs_are_of_figures_that_are_read():
    path = ROOT / "scripts" / "gate_bounds.json"
    kept = json.loads(path.read_text("utf-8"))
    assert kept
    for name, held in kept.items():
        assert gate.read_bounds(path, held["weights_sha256"])[0] == name
        own = {figure: runs[0] for figure, runs in held["runs"].items()}
        assert gate.judge(own, held["runs"])[1]

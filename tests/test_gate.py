"""scripts/gate_figures.py: what it reads from a run, and what its exit code says."""

import importlib.util
import json
import math

import pytest

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


@pytest.mark.parametrize(
    ("bounds", "code", "said"),
    [
        ({"m": {"accuracy_after": {"low": 0.7, "runs": [0.74, 0.75, 0.76]}}}, 0, "from 3 runs"),
        ({"m": {"sampler_difference": {"high": 0.004}}}, 1, "OUTSIDE"),
        ({}, 3, "no bounds for m"),
        ({"other": {"accuracy_after": {"low": 1}}}, 3, "no bounds for m"),
        ({"m": {"acuracy": {"low": 1}}}, 2, "bounds for acuracy"),
    ],
)
def test_the_exit_code_tells_whether_all_figures_lie_within(
    run, tmp_path, capsys, bounds, code, said
):
    path = tmp_path / "bounds.json"
    path.write_text(json.dumps(bounds))
    assert gate.main([str(run), "m", str(path)]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_a_figure_that_is_no_number_is_outside():
    assert not gate.judge({"last_rewards": math.nan}, {"last_rewards": {"low": 0.0}})[1]


def test_a_run_that_has_not_finished_is_no_run(tmp_path, capsys):
    assert gate.main([str(tmp_path), "m", str(ROOT / "scripts" / "gate_bounds.json")]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_kept_bounds_are_of_figures_that_are_read():
    bounds = json.loads((ROOT / "scripts" / "gate_bounds.json").read_text("utf-8"))
    for figures in bounds.values():
        assert set(figures) <= set(FIGURES)

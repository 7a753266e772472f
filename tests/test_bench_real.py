"""The benchmark on real work: its arithmetic, and a tiny run of both sides."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.tasks.problems import make_problems

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_real.py"
SPEC = importlib.util.spec_from_file_location("bench_real", SCRIPT)
assert SPEC is not None and SPEC.loader is not None
bench_real = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench_real)

TINY = ["grpo.prompts_per_step=4", "grpo.group_size=2", "rollout.max_completion_tokens=8"]


def test_figures_are_those_of_the_lines():
    steps = [
        {
            "time": 100 + 50 + 2.0 * i + (1.0 if i > 5 else 0.0),
            "reward": 0.05 * i,
            "completions/mean_length": 10.0,
            "time/rollout_s": 0.5,
            "time/programs_compiled": 3.0 if i == 0 else float(i == 7),
            "time/programs_from_disk": 2.0 * (i == 0),
            "time/compile_s": 40.0 if i == 0 else 0.5 * (i == 7),
            "sampling/sampling_logp_difference/mean": 0.01 * (2 if i == 4 else 1),
        }
        for i in range(20)
    ]
    found = bench_real.figures(steps, rows=8, started=100.0, passes=0.42)
    assert found["first_step_s"] == 50
    assert found["mean_step_s"] == pytest.approx(39 / 19)
    assert found["median_step_s"] == 2
    assert found["tokens_per_s"] == pytest.approx(80 * 19 / 39)
    assert (found["programs"], found["programs_after_first"], found["compile_s"]) == (4, 1, 40.5)
    assert found["programs_from_disk"] == 2
    assert found["largest_drift"] == pytest.approx(2)
    # Steps 5 to 14 are the first ten whose mean, 0.05 x 9.5, is above; their last is the 14th + 1.
    assert found["passes_step"] == 14 and found["passes_s"] == 50 + 2 * 13 + 1
    assert found["last_reward"] == pytest.approx(0.05 * 14.5)
    assert found["series"]["reward"] == [step["reward"] for step in steps]
    assert found["series"]["end_s"][:2] == [50, 52] and len(found["series"]["drift"]) == 20
    never = bench_real.figures(steps[: bench_real.WINDOW - 1], rows=8, started=100.0, passes=0.0)
    assert never["passes_s"] is None
    assert "mean_step_s" not in bench_real.figures(steps[:1], rows=8, started=100.0, passes=0.0)


def test_phases_of_a_start_count_from_the_process_start():
    start = {"began": 102.0, "imports": 1.5, "weights": 4.0, "eval_sampler": 9.0}
    found = bench_real.start_figures(start, started=100.0)
    assert found == {"start_imports_s": 3.5, "start_weights_s": 6.0}
    assert set(found) < set(bench_real.ROWS)
    assert bench_real.start_figures({}, started=100.0) == {}


def test_a_peer_that_fails_does_not_take_our_figures_along(tmp_path, monkeypatch, capsys):
    ours = {"steps": 3, "first_step_s": 9.0, "mean_step_s": 2.0, "versions": {"jax": "0"}}

    def run(config, peer, args):
        if peer is not None:
            raise bench_real.ConfigError(f"{peer} ended with exit code 1")
        return ours

    out = tmp_path / "figures.json"
    words = [str(EMBEDDED_DIR), str(tmp_path), "--peer", "trl-vllm", "--out", str(out)]
    monkeypatch.setattr(bench_real, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_real.py", *words])
    assert bench_real.main() == 2
    said = capsys.readouterr()
    assert "3 steps from process start" in said.out
    assert "trl-vllm ended with exit code 1" in said.err
    assert json.loads(out.read_text()) == {"jaxgrpo": ours}


@pytest.mark.slow
@pytest.mark.parametrize("peer", [[], ["--peer", "trl", "--rows", "8"]], ids=["alone", "trl"])
def test_a_tiny_run_of_both_sides(tmp_path, peer):
    rows = "".join(json.dumps(row) + "\n" for row in make_problems("train", 64))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "test.jsonl").write_text(rows)
    config = EMBEDDED_DIR.parent / "embedded.yaml"
    words = [str(EMBEDDED_DIR), str(tmp_path), "--config", str(config), "--steps", "3", *peer]
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--out", str(out), *TINY],
        capture_output=True,
        text=True,
        timeout=900,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["jaxgrpo"]["steps"] == 3 and found["jaxgrpo"]["programs_after_first"] == 0
    for figure in found.values():
        assert 0 < figure["mean_step_s"] < figure["first_step_s"]
        assert 0 < figure["mean_length"] <= 8
    assert list(found) == ["jaxgrpo", *peer[1:2]]

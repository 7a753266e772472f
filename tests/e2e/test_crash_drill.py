"""scripts/crash_drill.py finds what a crash could leave, and finds nothing.

One kill is part of the ordinary suite (`test_killed_run_goes_on_to_the_same_numbers`); these are
several, through the script itself.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.test_layout import ROOT

SCRIPT = ROOT / "scripts" / "crash_drill.py"


@pytest.fixture(scope="module")
def drill():
    spec = importlib.util.spec_from_file_location("crash_drill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_three_kills_cost_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--kills", "3", "--steps", "8"]
    # One device, as a person has, and not the eight of these tests.
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 differences, 0 tracebacks" in done.stdout
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 1


def write_run(path, loss=1.0, extra=None):
    (path / "checkpoints" / "2").mkdir(parents=True)
    (path / "checkpoints" / "2" / "x").write_text(str(path))
    (path / "config.yaml").write_text(f"run_dir: {path}\n")
    record = {"step": 1, "time": hash(path), "step_time": 0.1 * loss, "loss": loss}
    (path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(4))
    if extra:
        (path / extra).write_text("")
    return path


def test_runs_that_differ_in_times_and_paths_alone_are_equal(drill, tmp_path):
    assert drill.compare(write_run(tmp_path / "a"), write_run(tmp_path / "b")) == []


def test_a_number_or_a_file_more_is_found(drill, tmp_path):
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", 1 + 2**-52, "eval.tmp")
    assert drill.compare(one, other) == ["only in one of them: eval.tmp", "differs: metrics.jsonl"]

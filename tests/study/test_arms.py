"""Whole studies on the embedded model: every plan trains, budgets hold, a second call only reports,
a killed study reaches the same numbers."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxgrpo.config import MODULES
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.run import main
from tests.processes import environment
from tests.test_layout import REFUSE_JAX

PLANS = ["uniform", "proportional", "random", "reduced", "top_k", "equalised"]
PLANS += ["fim", "gora", "eva", "adalora", "adaptive", "para", "uniform_cut"]
SMALL = {
    "steps": 4,
    "checkpoint_every_steps": 2,
    "log_completions_every_steps": 0,
    "lora": {"rank": 4, "alpha": 8},
    "data": {"max_prompt_tokens": 56, "prompt_bucket_tokens": 56},
    "rollout": {"max_completion_tokens": 24},
    "grpo": {"prompts_per_step": 4, "group_size": 4, "micro_batches": 1},
    "optim": {"learning_rate": 1.0e-3},
    "eval": {"problems": 32, "batch_prompts": 32},
    "study": {
        "profile": {"objectives": ["grpo", "sft"], "steps": 4, "calibration_batches": 1},
        "allocation": {"min_rank": 1, "max_rank": 8, "top_layers": 4, "adaptive_every_steps": 2},
        "probe": {"scale_rules": ["constant", "alpha_over_r"], "draws": 2, "layer_draws": 0},
        "arms": {"plans": PLANS, "scale_rules": ["constant"], "seeds": [0]},
        "cuts": {"energy": [0.9], "parameters": [0.25]},
    },
}
pytestmark = pytest.mark.usefixtures("one_device")
# A finished study must report where jax cannot be imported.
REPORT_ONLY = (
    REFUSE_JAX
    + """
from jaxgrpo.run import main
sys.exit(main(sys.argv[1:]))
"""
)


def write_config(path: Path, **study) -> Path:
    config = SMALL | {"run_dir": str(path), "study": SMALL["study"] | study}
    file = path.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return file


def read(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("studies") / "all"
    config = write_config(root)
    assert main(["study", str(config)]) == 0
    return root, config


def test_every_plan_is_trained_at_the_budget(study):
    root, _ = study
    results = read(root / "results.json")
    arms = {arm["plan"]: arm for arm in results["arms"]}
    assert list(arms) == PLANS
    uniform = arms["uniform"]
    assert uniform["rank_min"] == uniform["rank_max"] == 4
    for plan, arm in arms.items():
        assert arm["n_items"] == 32 and 0 <= arm["low"] <= arm["accuracy"] <= arm["high"] <= 1
        assert set(arm["ranks"]) == set(MODULES)
        every = np.concatenate(list(arm["ranks"].values()))
        assert every.max() <= 8 and every.min() >= (0 if plan in ("adalora", "para") else 1)
        if plan == "reduced":
            assert 0.6 < arm["trainable_parameters"] / uniform["trainable_parameters"] <= 0.7
        else:
            assert arm["trainable_parameters"] == uniform["trainable_parameters"]
    assert [len(arms[p]["versus"] or ()) > 0 for p in PLANS] == [False] + [True] * 12


def test_trained_adapters_have_the_ranks_that_are_reported(study):
    """What PEFT would load, not what a plan file says: every A and B's own shape."""
    from safetensors.numpy import load_file

    root, _ = study
    sizes = {}
    for arm in read(root / "results.json")["arms"]:
        folder = next((root / "arms").glob(f"{arm['plan']}-*"))
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        sizes[arm["plan"]] = sum(t.size for t in tensors.values())
        for module, ranks in arm["ranks"].items():
            for layer, rank in enumerate(ranks):
                found = [
                    t.shape[0]
                    for name, t in tensors.items()
                    if f"layers.{layer}." in name and f"{module}.lora_A" in name
                ]
                assert found == ([rank] if rank else [])
    # What is in the files: as many parameters in every arm, those that moved or were cut too.
    assert sizes.pop("reduced") < sizes["uniform"]
    assert set(sizes.values()) == {sizes["uniform"]}, sizes


def test_the_uniform_adapter_is_cut_and_evaluated_without_training(study):
    root, _ = study
    results = read(root / "results.json")
    uniform = results["arms"][0]
    by_energy, quarter = results["cuts"]
    assert quarter["parameters"][0] <= 0.25 * uniform["trainable_parameters"]
    # As many as fit: no rank of the embedded model costs 2,000 parameters.
    assert quarter["parameters"][0] > 0.25 * uniform["trainable_parameters"] - 2000
    assert by_energy["parameters"][0] < uniform["trainable_parameters"]
    for cut in results["cuts"]:
        assert cut["difference"] == [cut["accuracy"][0] - uniform["per_seed"][0]]
    folders = sorted((root / "cuts").iterdir())
    assert [f.name for f in folders] == [
        "uniform-r4-s0-energy-0.9",
        "uniform-r4-s0-parameters-0.25",
    ]
    assert not any(any((f / "checkpoints").iterdir()) for f in folders)


def test_cuts_and_the_report_are_made_by_name(study, tmp_path, capsys):
    root, _ = study
    again = tmp_path / "again"
    shutil.copytree(root, again)
    config = str(write_config(again))
    shutil.rmtree(again / "cuts" / "uniform-r4-s0-energy-0.9")
    (again / "results.json").unlink()
    assert main(["study", config, "study.only=[cuts,report]"]) == 0
    cut = Path("cuts") / "uniform-r4-s0-energy-0.9" / "eval" / "step_000004.json"
    assert read(again / cut)["eval/accuracy"] == read(root / cut)["eval/accuracy"]
    assert read(again / "results.json")["cuts"] == read(root / "results.json")["cuts"]
    shutil.rmtree(again / "arms" / "para-constant-r4-s0")
    assert main(["study", config, "study.only=[report]"]) == 2
    assert "1 of 13 arms have not ended" in capsys.readouterr().err
    uncut = str(write_config(again, cuts={}))
    assert main(["study", uncut, "study.only=[cuts]"]) == 2
    assert "unknown name 'cuts'" in capsys.readouterr().err


def test_arms_saw_the_same_prompts_and_the_same_items(study):
    root, _ = study
    prompts, items = [], []
    for folder in sorted((root / "arms").iterdir()):
        files = sorted((folder / "completions").glob("*"))
        assert len(files) == 4
        prompts.append([[r["problem"] for r in read_jsonl(file)] for file in files])
        items.append([r["index"] for r in read_jsonl(folder / "eval" / "step_000004.jsonl")])
    assert all(p == prompts[0] for p in prompts) and all(i == items[0] for i in items)


def test_profiles_hold_all_views_and_the_probe_gives_slopes(study):
    results = read(study[0] / "results.json")
    assert [p["objective"] for p in results["profiles"]] == ["grpo", "sft"]
    for profile in results["profiles"]:
        assert list(profile["views"]) == ["l2", "weight", "rank_free", "rms"]
        for view in profile["views"].values():
            assert np.isclose(sum(view["share"]), 1)
            assert (np.array(view["low"]) < view["high"]).all()
    slopes = {(a["scale_rule"], a["view"]): a for a in results["amplification"]}
    assert len(slopes) == 6
    for found in slopes.values():
        assert found["low"] <= found["slope"] <= found["high"]
    # Hardly trained, ||dL/dB|| ~ s sqrt(r) holds nearly exactly.
    assert abs(slopes["constant", "l2"]["slope"] - 0.5) < 0.15
    assert abs(slopes["alpha_over_r", "l2"]["slope"] + 0.5) < 0.15
    assert abs(slopes["constant", "weight"]["slope"]) < 0.1


def test_a_second_call_only_rebuilds_the_report_and_needs_no_jax(study):
    root, config = study
    runs = [p for part in ("arms", "cuts", "profiles", "probes") for p in (root / part).rglob("*")]
    before = {p: p.stat().st_mtime_ns for p in runs if p.is_file()}
    results = read(root / "results.json")
    (root / "report.html").unlink()
    done = subprocess.run(
        [sys.executable, "-c", REPORT_ONLY, "study", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy" in done.stdout and "arm 1 of" not in done.stdout
    assert (root / "report.html").is_file() and (root / "report.md").is_file()
    assert read(root / "results.json") == results
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_study_moved_elsewhere_only_rebuilds_its_report_and_needs_no_jax(study, tmp_path):
    """Where it lies, what watches it, and a setting younger than it, are no part of what it is."""
    root, _ = study
    moved = shutil.copytree(root, tmp_path / "moved")
    for path in [moved / "config.yaml", *moved.glob("*/*/config.yaml")]:
        older = yaml.safe_load(path.read_text())
        del older["grpo"]["importance_cap"]
        path.write_text(yaml.safe_dump(older))
    (moved / "report.html").unlink()
    words = ["study", str(moved), "grpo.micro_batches=4", "checkpoint_every_steps=3"]
    done = subprocess.run(
        [sys.executable, "-c", REPORT_ONLY, *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "arm 1 of" not in done.stdout and (moved / "report.html").is_file()
    assert read(moved / "results.json")["arms"] == read(root / "results.json")["arms"]


def test_an_arm_whose_ranks_would_be_others_is_refused_by_name(study, tmp_path, capsys):
    """What the plan's file says, and not where it lies, is what an arm was trained with."""
    moved = shutil.copytree(study[0], tmp_path / "moved")
    assert main(["study", str(moved), "study.allocation.max_rank=7"]) == 2
    error = capsys.readouterr().err
    assert "plan." in error and "is" in error and error.count("\n") == 1


def test_other_rows_are_refused_before_another_arm_is_trained(study, tmp_path, capsys):
    moved = shutil.copytree(study[0], tmp_path / "moved")
    summary = read(moved / "profiles" / "grpo" / "summary.json")
    summary["prompts"]["eval"] = "0" * 64
    (moved / "profiles" / "grpo" / "summary.json").write_text(json.dumps(summary))
    assert main(["study", str(moved), f"study.arms.plans=[{','.join([*PLANS, 'inverse'])}]"]) == 2
    assert "data.path embedded holds other rows (eval)" in capsys.readouterr().err


def test_another_configuration_in_the_same_directory_is_refused(study, capsys):
    _, config = study
    assert main(["study", str(config), "optim.learning_rate=0.5"]) == 2
    error = capsys.readouterr().err
    assert "optim.learning_rate was 0.001, is 0.5" in error and error.count("\n") == 1


def test_more_arms_can_be_added_to_a_finished_study(study, tmp_path, capsys):
    """The plan lists may grow; what is there stays."""
    root, _ = study
    grown = yaml.safe_load(root.with_suffix(".yaml").read_text())
    grown["study"]["arms"]["plans"] = [*PLANS, "inverse"]
    config = tmp_path / "grown.yaml"
    config.write_text(yaml.safe_dump(grown))
    assert main(["study", str(config)]) == 0
    out = capsys.readouterr().out
    assert "arm 14 of 14" in out and "arm 13 of 14" not in out


@pytest.mark.slow
def test_a_killed_study_reaches_the_same_numbers(tmp_path):
    """SIGKILL in a profile, in an arm and between; finished afterwards, against an undisturbed one.

    Both run in processes of one kind: the same program gives the same bits.
    """
    arms = {"plans": ["uniform", "adaptive", "para"], "scale_rules": ["constant"], "seeds": [0]}
    few = {"profile": {"objectives": ["grpo"], "steps": 4}, "arms": arms}
    few |= {"probe": {"scale_rules": ["constant"], "draws": 2, "layer_draws": 0}}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for root in (straight, killed):
        write_config(root, **few)
    assert _study(straight).wait(300) == 0
    for sign in (
        "profiles/grpo/metrics.jsonl",
        "arms/uniform-r4-s0/checkpoints/2",
        "arms/adaptive-constant-r4-s0/checkpoints/2",
    ):
        process = _study(killed)
        deadline = time.monotonic() + 240
        while not (killed / sign).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _study(killed).wait(300) == 0
    assert _comparable(killed) == _comparable(straight)


def _study(root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxgrpo.run", "study", str(root.with_suffix(".yaml"))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment(1))


def _comparable(root: Path):
    """results.json without wall-clock times."""
    results = read(root / "results.json")
    for arm in results["arms"]:
        for timing in ("seconds", "tokens_per_s"):
            arm.pop(timing)
    return results

"""A study without gradient, as where every reward is 0: one line with the cause, no shares."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxgrpo.config import ConfigError
from jaxgrpo.study.config import StudyFiles, list_arms
from jaxgrpo.study.norms import no_gradient
from jaxgrpo.study.planner import Planner
from jaxgrpo.study.report import write_report
from jaxgrpo.study.results import collect_results
from tests.study.test_results import LAYERS, make_study, write_norms


def write_zeros(path, reward, flat=1.0):
    """A run of six steps whose norms are all 0."""
    path.mkdir(parents=True, exist_ok=True)
    zeros = {"q_proj": {"a": [0.0] * LAYERS, "b": [0.0] * LAYERS}}
    norms = dict.fromkeys(("l2", "rms", "rank_free"), zeros)
    norms["weight"] = {"q_proj": {"w": [0.0] * LAYERS}}
    lines = [json.dumps({"step": step, **norms}) for step in range(1, 7)]
    (path / "layer_grad_norms.jsonl").write_text("\n".join(lines) + "\n")
    step = {"step_time": 1.0, "num_tokens": 9.0, "reward": reward, "frac_reward_zero_std": flat}
    lines = [json.dumps({"step": number, **step}) for number in range(1, 7)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def study(tmp_path):
    config = make_study(tmp_path, {"uniform": 0.5, "proportional": 0.5, "random": 0.5})
    files = StudyFiles(config.run_dir)
    for run in (files.profile("grpo"), *(files.arm(arm) for arm in list_arms(config))):
        write_zeros(run, 0.0)
    files.plans.mkdir()
    for draw in range(config.study.probe.runs):
        for rule in ("uniform", *config.study.probe.scale_rules):
            write_zeros(files.probe(rule, draw), 0.0)
        ranks = {"q_proj": np.roll([2, 4, 8, 16] * (LAYERS // 4), draw).tolist()}
        files.plan(f"probe-{draw}").write_text(json.dumps({"ranks": ranks}))
    return config, files


def test_the_report_is_made_without_shares(study):
    config, files = study
    results = collect_results(config)
    assert results["profiles"] == [] and results["amplification"] == []
    write_report(results, files.root)
    assert (files.root / "report.html").is_file() and (files.root / "report.md").is_file()


def test_the_cause_is_named(study):
    _, files = study
    path = files.profile("grpo")
    cause = f"the gradient was 0 in all 6 steps of {path}: in each the completions of every "
    assert no_gradient(path) == cause + "prompt got equal rewards, 0 on average"
    write_zeros(path, 0.5, flat=0.9)
    assert no_gradient(path).endswith("no loss depended on the adapters")
    write_norms(files.root / "other", [8] * LAYERS, 0.5)
    assert no_gradient(files.root / "other") is None and no_gradient(files.root / "none") is None


def test_a_plan_by_gradient_is_refused_before_any_arm_is_trained(study):
    config, files = study
    (files.profile("grpo") / "summary.json").write_text(
        json.dumps({"model": {"layers": LAYERS, "module_shapes": {"q_proj": [8, 8]}}})
    )
    planner = Planner(config)
    arms = {arm.plan: arm for arm in list_arms(config)}
    with pytest.raises(ConfigError, match="plan proportional has nothing to go by: the gradient"):
        planner.importance(arms["proportional"])
    planner.importance(arms["random"])
    assert planner.speeds(arms["random"], {"q_proj": [8] * LAYERS}) == {}

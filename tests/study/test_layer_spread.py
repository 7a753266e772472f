"""How unevenly runs spread the gradient, and what LoRA's algebra makes of the uniform runs."""

import dataclasses
import json

import numpy as np
import pytest

from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.study.config import StudyFiles, list_arms, scaled_lora
from jaxgrpo.study.importance import early_late_correlation
from jaxgrpo.study.layer_spread import landscapes, layer_spread
from tests.study.test_results import make_config, write_arm

RANKS = np.array([4, 4, 8, 8, 8, 8, 12, 12])


def write_run(config, arm, size, feedback=0.0):
    """A run whose raw norms are s sqrt(r) g, times rank^feedback, with g of its seed."""
    write_arm(config, arm, [True])
    folder = StudyFiles(config.run_dir).arm(arm)
    ranks = RANKS if arm.plan == "proportional" else np.full(len(RANKS), 8)
    lora = dataclasses.replace(config.lora, **scaled_lora(config, arm.scale_rule or "constant", 8))
    plan = make_rank_plan(lora, len(RANKS), dict.fromkeys(lora.target_modules, ranks))
    summary = json.loads((folder / "summary.json").read_text()) | {"plan": plan.to_json()}
    (folder / "summary.json").write_text(json.dumps(summary))
    norms = plan.scales()["q_proj"] * np.sqrt(ranks) * size * (ranks / 8.0) ** feedback
    lines = [
        {"step": step, "l2": {"q_proj": {"a": (norms * step).tolist(), "b": norms.tolist()}}}
        for step in range(1, 7)
    ]
    (folder / "layer_grad_norms.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.mark.parametrize("rule", ["constant", "alpha_over_r", "rslora"])
@pytest.mark.parametrize("feedback", [0.0, 0.3])
def test_algebra_foretells_what_no_feedback_gives(tmp_path, rule, feedback):
    config = make_config(tmp_path, plans=["uniform", "proportional"], scale_rules=[rule])
    sizes = {0: np.linspace(1, 2, len(RANKS)), 1: np.linspace(1, 3, len(RANKS))}
    groups = {}
    for arm in list_arms(config):
        write_run(config, arm, sizes[arm.seed], feedback if arm.plan == "proportional" else 0.0)
        groups.setdefault(arm.group, []).append(arm)
    (found,) = layer_spread(groups, StudyFiles(config.run_dir))
    assert found["seeds"] == 2 and len(found["own"]) == 4
    assert [x["value"] for x in found["uniform"]] == pytest.approx([np.sqrt(6)] * 4)
    assert (found["uniform"][-1]["low"], found["uniform"][-1]["high"]) == pytest.approx((2, 3))
    scale = {"constant": RANKS**0.0, "alpha_over_r": 8 / RANKS, "rslora": np.sqrt(8 / RANKS)}[rule]
    ratios = []
    for size in sizes.values():
        norms = size * scale * np.sqrt(RANKS)
        ratios.append(norms.max() / norms.min())
    assert found["foretold"]["value"] == pytest.approx(np.sqrt(np.prod(ratios)))
    assert (found["own"][-1]["value"] == pytest.approx(found["foretold"]["value"])) == (
        feedback == 0
    )


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_with_no_finished_uniform_one_beside_it_is_left_out(tmp_path, ended):
    config = make_config(tmp_path, plans=["uniform", "proportional"], seeds=[0, 1])
    files, groups = StudyFiles(config.run_dir), {}
    for arm in list_arms(config):
        write_run(config, arm, np.linspace(1, 2, len(RANKS)))
        if arm.seed == 0 and (arm.plan == "uniform") == ended:
            (files.arm(arm) / "summary.json").unlink()
        groups.setdefault(arm.group, []).append(arm)
    (found,) = layer_spread(groups, files)
    assert found["seeds"] == 1


def test_a_layer_without_gradient_has_no_spread(tmp_path):
    config = make_config(tmp_path, plans=["uniform", "proportional"], seeds=[0])
    groups = {}
    for arm in list_arms(config):
        write_run(config, arm, np.arange(len(RANKS)))
        groups.setdefault(arm.group, []).append(arm)
    (found,) = layer_spread(groups, StudyFiles(config.run_dir))
    assert found["own"][-1] == {"value": None, "low": None, "high": None}
    json.dumps(found, allow_nan=False)


def test_the_landscape_of_uniform_runs_by_objective(tmp_path):
    config = make_config(
        tmp_path, plans=["uniform", "proportional"], objectives=["grpo", "sft"], seeds=[0, 1, 2]
    )
    files, groups = StudyFiles(config.run_dir), {}
    for arm in list_arms(config):
        steep = 3.0 if arm.objective == "sft" else 1.0
        write_run(config, arm, np.linspace(1, 1 + steep * (arm.seed + 1), len(RANKS)))
        groups.setdefault(arm.group, []).append(arm)
    (files.arm(groups["uniform-r8-sft"][2]) / "summary.json").unlink()
    grpo, sft = landscapes(groups, files)
    assert (grpo["run"], grpo["objective"], grpo["seeds"]) == ("uniform-r8", "grpo", 3)
    assert (sft["run"], sft["objective"], sft["seeds"]) == ("uniform-r8-sft", "sft", 2)
    assert grpo["steps"] == 6 and grpo["top_layers"] == 2
    # A's norms grow by one of B's each step, in every layer alike.
    assert [x["value"] for x in grpo["max_min"]] == pytest.approx([24 ** (1 / 3)] * 4)
    assert (grpo["max_min"][-1]["low"], grpo["max_min"][-1]["high"]) == pytest.approx((2, 4))
    assert [x["value"] for x in sft["max_min"]] == pytest.approx([28**0.5] * 4)
    sizes = [np.linspace(1, 2 + seed, len(RANKS)) for seed in range(3)]
    held = [size[-2:].sum() / size.sum() for size in sizes]
    assert grpo["top_share"]["value"] == pytest.approx(np.mean(held))
    assert (grpo["top_share"]["low"], grpo["top_share"]["high"]) == pytest.approx(
        (held[0], held[2])
    )
    assert grpo["early_late"]["value"] == pytest.approx(1.0)
    json.dumps([grpo, sft], allow_nan=False)


def test_a_correlation_of_equal_layers_is_not_defined(tmp_path):
    config = make_config(tmp_path, plans=["uniform"], seeds=[0])
    (arm,) = list_arms(config)
    write_run(config, arm, np.ones(len(RANKS)))
    assert early_late_correlation(np.ones((4, len(RANKS)))) is None
    (found,) = landscapes({arm.group: [arm]}, StudyFiles(config.run_dir))
    assert found["early_late"] == {"value": None, "low": None, "high": None}
    assert found["max_min"][-1]["value"] == pytest.approx(1.0)

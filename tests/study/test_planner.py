"""From a configuration to plans: bounds, names, speeds, what is refused before a profile."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxgrpo.config import MODULES, ConfigError
from jaxgrpo.config_files import decode_config, dump_config, encode_config, load_config
from jaxgrpo.identity import identity
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.run import main
from jaxgrpo.study.allocate import allocate, spent
from jaxgrpo.study.budget import Budget
from jaxgrpo.study.config import (
    Arm,
    StudyConfig,
    StudyFiles,
    arm_label,
    list_arms,
)
from jaxgrpo.study.norms import first_order_speed
from jaxgrpo.study.planner import Planner
from jaxgrpo.study.runs import (
    arm_config,
    has_plan_file,
    plan_name,
    probe_config,
    profile_config,
)
from jaxgrpo.study.sections import PLANS, WIDE
from tests.study.test_allocate import PAPER_SHARES, QWEN_1_5B

QWEN_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def make_config(root, allocation=None, arms=None, rank=32, **rest):
    """A study of Qwen2.5-1.5B's shapes: nothing but its config.json is there."""
    (root / "model").mkdir(exist_ok=True)
    (root / "model" / "config.json").write_text(json.dumps(QWEN_CONFIG))
    raw = {
        "run_dir": str(root / "study"),
        "model": {"path": str(root / "model")},
        "lora": {"rank": rank, "alpha": 2.0 * rank},
        "study": {"allocation": allocation or {}, "arms": arms or {}} | rest,
    }
    return decode_config(raw, StudyConfig)


def shares(scale=1.0):
    """The paper's importance, the same for every module."""
    return dict.fromkeys(MODULES, PAPER_SHARES * scale)


def test_every_plan_has_bounds_of_its_own(tmp_path):
    """The paper's: 20 to 40 for proportional, 16 to 48 for random, 12 to 31 for reduced."""
    own = {"random": [16, 48], "reduced": [12, 31]}
    allocation = {"min_rank": 20, "max_rank": 40, "unit": "ranks", "bounds": own}
    config = make_config(tmp_path, allocation, {"plans": ["uniform", "proportional", *own]})
    planner, found = Planner(config), {}
    for arm in list_arms(config):
        if has_plan_file(arm) and arm.seed == 0:
            values = shares() if arm.plan != "random" else dict.fromkeys(MODULES, np.ones(28))
            found[arm.plan] = planner.allocate(arm, values)["q_proj"]
    assert (found["proportional"].min(), found["proportional"].max()) == (20, 40)
    assert found["random"].min() < 20 and found["random"].max() > 40
    assert found["random"].sum() == found["proportional"].sum() == 896
    assert config.bounds(32, "reduced") == (12, 31)
    assert found["reduced"].sum() == 627 and 12 <= found["reduced"].min() <= 14
    # Adapters are stacked to the widest, so that one program and one draw of A serve all arms.
    assert {arm_config(config, arm, False).lora.max_rank for arm in list_arms(config)} == {48}


def test_reduced_scales_both_bounds_with_its_budget(tmp_path):
    config = make_config(tmp_path, {"min_rank": 20, "max_rank": 40})
    assert config.bounds(32) == (20, 40)
    assert config.bounds(32, "reduced") == (14, 28)
    assert config.bounds(8, "reduced") == (3, 7)


def test_bounds_survive_the_way_to_a_file_and_back(tmp_path):
    config = make_config(tmp_path, {"bounds": {"random": [16, 48]}})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config([file], [], StudyConfig) == config
    assert decode_config(encode_config(config), StudyConfig) == config


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"allocation": {"bounds": {"randon": [1, 64]}}}, "did you mean 'random'"),
        ({"allocation": {"bounds": {"para": [1, 64]}}}, "study.allocation.bounds"),
        ({"allocation": {"bounds": {"random": [48, 64]}}}, "mean rank 32 of random lies outside"),
        ({"allocation": {"bounds": {"reduced": [23, 64]}}}, "mean rank 22.4 of reduced"),
        ({"allocation": {"bounds": {"random": [40, 20]}}}, "a smallest and a largest"),
        ({"cuts": {"energy": [1.5]}}, "study.cuts.energy must lie in"),
        ({"arms": {"objectives": ["grop"]}}, "one of: grpo, sft"),
        (
            {"arms": {"objectives": ["sft"]}, "profile": {"objectives": ["grpo"]}},
            "add it to study.profile.objectives",
        ),
    ],
)
def test_mistakes_are_told(tmp_path, study, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **study)


def test_top_k_is_refused_before_the_profile_with_the_smallest_k_that_fits(tmp_path, capsys):
    """4 of 28 layers at most at twice the mean cannot hold the budget; 14 can at 1 to 64."""
    config = make_config(tmp_path, arms={"plans": ["uniform", "top_k"]})
    file = tmp_path / "study.yaml"
    file.write_text(dump_config(config))
    for option in ([], ["--dry-run"]):
        assert main(["study", str(file), *option]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "study.allocation.top_layers" in error
        assert "the smallest k that spends them is 14 of 28 layers" in error
        assert not StudyFiles(config.run_dir).profile("grpo").exists()
    assert main(["study", str(file), "study.allocation.top_layers=14", "--dry-run"]) == 0
    assert "4 arms of" in capsys.readouterr().out
    assert main(["study", str(file), "study.allocation.top_layers=13", "--dry-run"]) == 2


def test_every_plan_can_be_made_for_28_layers(tmp_path):
    """At rank 16, under either unit, with importances as uneven as a real model's."""
    rng = np.random.default_rng(0)
    for unit in ("ranks", "parameters"):
        allocation = {"unit": unit, "top_layers": 14, "min_rank": 4, "max_rank": 32}
        arms = {"plans": list(PLANS), "seeds": [0]}
        config = make_config(tmp_path, allocation, arms, rank=16)
        planner = Planner(config)
        planner.check()
        totals = set()
        for arm in list_arms(config):
            if not has_plan_file(arm) or arm.plan in (*WIDE, "reduced"):
                continue
            values = {m: rng.lognormal(0, 1, (28, 32)) for m in MODULES}
            values = {m: -np.sort(-v, axis=1) for m, v in values.items()}
            if arm.plan != "eva":
                values = {m: v[:, 0] for m, v in values.items()}
            totals.add(spent(planner.allocate(arm, values), QWEN_1_5B, unit))
        assert len(totals) == 1


def test_plans_are_shared_only_by_arms_that_they_are_right_for(tmp_path):
    """Equalised ranks depend on the scale rule, measured ones on the objective, random on seeds."""
    plans = ["uniform", "equalised", "proportional", "random"]
    rules = ["constant", "alpha_over_r"]
    arms = {"plans": plans, "scale_rules": rules, "objectives": ["grpo", "sft"], "seeds": [0, 1]}
    config = make_config(tmp_path, arms=arms)
    files: dict[str, set] = {}
    for arm in list_arms(config):
        if has_plan_file(arm):
            files.setdefault(arm.plan, set()).add(plan_name(config, arm))
    assert {plan: len(names) for plan, names in files.items()} == {
        "equalised": 4,  # rules x objectives
        "proportional": 2,
        "random": 4,
    }
    given = make_config(tmp_path, {"objective": "grpo"}, arms)
    names = {plan_name(given, a) for a in list_arms(given) if a.plan == "proportional"}
    assert len(names) == 1, "one objective's importance for both"


def test_arms_of_either_objective_train_with_it_and_are_told_apart(tmp_path):
    arms = {"plans": ["uniform", "fim"], "objectives": ["grpo", "sft"], "seeds": [0]}
    config = make_config(tmp_path, arms=arms)
    found = list_arms(config)
    assert [arm_config(config, arm, False).objective for arm in found] == ["grpo"] * 2 + ["sft"] * 2
    assert len({arm.name for arm in found}) == 4
    labels = [arm_label(arm, config) for arm in found]
    assert labels[1] == "FIM-LoRA (ranks only), GRPO" and labels[2] == "uniform, SFT"


def test_proportional_by_module_differs_from_fim_in_its_criterion_alone(tmp_path):
    """One rank per adapter, in parameters' shares as proportional's layers have them."""
    config = make_config(tmp_path, arms={"plans": ["uniform", "proportional_module"]})
    importance = {m: PAPER_SHARES * (1 + i) for i, m in enumerate(MODULES)}
    ranks = Planner(config).allocate(Arm("proportional_module", "constant", 32, 0), importance)
    assert len({tuple(r) for r in ranks.values()}) == len(MODULES)
    total = 32 * 28 * sum(map(sum, QWEN_1_5B.values()))
    by_module = Budget(total, "parameters", 1, 64, "module")
    expected = allocate("proportional", importance, QWEN_1_5B, by_module)
    for module in MODULES:
        np.testing.assert_array_equal(ranks[module], expected[module])


def test_probes_give_every_adapter_each_rank_level_in_turn(tmp_path):
    """A Latin square of adapters and draws, and two draws with one rank per layer, once above and
    once below: levels as far apart as the width allows, whatever the arms' bounds."""
    planner = Planner(make_config(tmp_path, {"min_rank": 20, "max_rank": 40}))
    draws = planner.probes()
    levels = [8, 16, 32, 40]
    for module in MODULES:
        apart = np.array([draw[module] for draw in draws[:4]])
        assert (np.sort(apart, axis=0) == np.array(levels)[:, None]).all()
        for row in apart:
            assert np.unique(row, return_counts=True)[1].tolist() == [7] * 4
        first, second = (draw[module] for draw in draws[4:])
        assert ((first < 32) != (second < 32)).all()
        np.testing.assert_array_equal(first, draws[4]["q_proj"])
    assert not np.array_equal(draws[0]["q_proj"], draws[0]["k_proj"])
    # Draws have seeds and uniform runs of their own; that of the first is the profile.
    config, files = planner.config, planner.files
    assert [probe_config(config, "constant", d).seed for d in range(6)] == [0, 1, 2, 3, 4, 5]
    beside = probe_config(config, None, 5)
    assert (beside.seed, beside.lora.plan) == (5, None)
    assert beside.run_dir == str(files.uniform(5)) != str(files.uniform(4))
    assert identity(probe_config(config, None, 0)) == identity(profile_config(config, "grpo"))


@pytest.mark.parametrize("other", ["ranks", "landscape"])
def test_studies_of_one_model_have_uniform_runs_in_common(other):
    configs = [
        load_config([f"configs/study_qwen{name}.yaml"], ["run_dir=runs/study"], StudyConfig)
        for name in ("", f"_{other}")
    ]
    found = [{arm.name: arm_config(c, arm, first=False) for arm in list_arms(c)} for c in configs]
    shared = [name for name in found[1] if name in found[0]]
    assert shared == ["uniform-r16-s2", "uniform-r16-s5", "uniform-r16-s8"]
    for name in shared:
        of_design, own = (runs[name] for runs in found)
        assert of_design.run_dir == own.run_dir and identity(of_design) == identity(own)
    assert identity(profile_config(configs[0], "grpo")) == identity(
        profile_config(configs[1], "grpo")
    )
    # Arms of other ranks are trained beside them, in programs of one width.
    assert {run.lora.max_rank for run in found[1].values()} == {32}


def test_parts_are_named_and_come_after_what_they_build_on(tmp_path, capsys):
    file = tmp_path / "study.yaml"
    file.write_text(dump_config(make_config(tmp_path)))
    assert main(["study", str(file), "study.only=[probes]"]) == 2
    assert "run the same study with study.only=[prepare] first" in capsys.readouterr().err
    assert main(["study", str(file), "study.only=[probe]"]) == 2
    assert "did you mean 'probes'?" in capsys.readouterr().err


def test_probes_without_ranks_that_differ_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"set study\.probe\.scale_rules=\[\]"):
        make_config(tmp_path, {"max_rank": 1}, rank=1)


def test_first_order_speed_is_the_reviewed_figure():
    """Proportional ranks between 20 and 40 on the paper's shares: 1.04 under `constant`, inverse
    0.965 (to the rounding of whole ranks); alpha_over_r takes a rank's speed away."""
    budget = Budget(896, min_rank=20, max_rank=40)
    importance = {"q_proj": PAPER_SHARES}

    def speed(method, rule):
        ranks = allocate(method, importance, QWEN_1_5B, budget)
        return first_order_speed(RankPlan(ranks, 64, 64.0, rule, 32), importance)

    assert speed("proportional", "constant") == pytest.approx(1.04, abs=0.01)
    assert speed("inverse", "constant") == pytest.approx(0.965, abs=0.01)
    assert speed("proportional", "rslora") == pytest.approx(1.02, abs=0.01)
    assert speed("proportional", "alpha_over_r") == pytest.approx(1.0, rel=1e-6)
    for rule, expected in (("constant", 2.0), ("rslora", 2**0.5), ("alpha_over_r", 1.0)):
        wide = RankPlan({"q_proj": np.full(28, 64)}, 64, 64.0, rule, 32)
        assert first_order_speed(wide, importance) == pytest.approx(expected, rel=1e-6)

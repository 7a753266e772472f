"""Rank plans: scales worked out by hand, masks, budgets, and what a plan file may not say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxgrpo.config import MODULES, ConfigError, LoraConfig
from jaxgrpo.rank_plan import RankPlan, make_rank_plan


def plan_of(ranks, rule="constant", max_rank=8, alpha=16.0, reference_rank=4):
    arrays = {module: np.asarray(values) for module, values in ranks.items()}
    return RankPlan(arrays, max_rank, alpha, rule, reference_rank)


def read(tmp_path, raw, layers=3, **settings):
    path = tmp_path / "plan.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8")
    return make_rank_plan(LoraConfig(plan=str(path), **settings), layers)


@pytest.mark.parametrize(
    ("rule", "by_hand"),
    [
        ("constant", [16 / 4, 16 / 4, 0, 16 / 4]),
        ("rslora", [16 / 1, 16 / 2, 0, 16 / 3]),
        ("alpha_over_r", [16 / 1, 16 / 4, 0, 16 / 9]),
    ],
)
def test_scales_are_those_worked_out_by_hand(rule, by_hand):
    scales = plan_of({"q_proj": [1, 4, 0, 9]}, rule, max_rank=9).scales()
    assert scales["q_proj"].dtype == np.float32
    np.testing.assert_allclose(scales["q_proj"], np.float32(by_hand), rtol=1e-7)


def test_a_mask_has_as_many_ones_as_the_rank_and_they_come_first():
    masks = plan_of({"v_proj": [2, 0, 3]}, max_rank=3).masks()
    assert masks["v_proj"].dtype == np.float32
    np.testing.assert_array_equal(masks["v_proj"], [[1, 1, 0], [0, 0, 0], [1, 1, 1]])


def test_modules_come_in_the_order_of_the_model():
    plan = plan_of({"down_proj": [1], "q_proj": [2], "o_proj": [3]})
    assert plan.modules == ("q_proj", "o_proj", "down_proj")
    assert list(plan.masks()) == list(plan.scales()) == list(plan.modules)
    assert list(plan.to_json()["ranks"]) == list(plan.modules)


def test_totals_count_every_adapter():
    plan = plan_of({"q_proj": [1, 2], "up_proj": [0, 5]})
    assert (plan.layers, plan.total_rank) == (2, 8)
    # A rank of a projection has a column of A and a row of B.
    assert plan.trainable_parameters({"q_proj": (10, 20), "up_proj": (10, 40)}) == 3 * 30 + 5 * 50


@pytest.mark.parametrize("rule", ["constant", "rslora", "alpha_over_r"])
def test_json_round_trip(rule):
    plan = plan_of({"q_proj": [1, 2], "up_proj": [0, 5]}, rule)
    raw = json.loads(json.dumps(plan.to_json()))
    again = RankPlan.from_json(raw)
    assert again.to_json() == plan.to_json() == raw
    for module in plan.modules:
        np.testing.assert_array_equal(again.ranks[module], plan.ranks[module])
        np.testing.assert_array_equal(again.scales()[module], plan.scales()[module])


def test_without_a_plan_every_adapter_has_the_same_rank():
    plan = make_rank_plan(LoraConfig(rank=5, alpha=10.0), layers=3)
    assert plan.modules == MODULES
    assert plan.total_rank == 5 * 3 * 7
    assert plan.max_rank == plan.reference_rank == 5
    assert all((scale == 2.0).all() for scale in plan.scales().values())


@pytest.mark.parametrize("raw", [[1, 2, 3], {"ranks": [1, 2, 3]}])
def test_a_list_holds_for_every_target_module(tmp_path, raw):
    plan = read(tmp_path, raw, target_modules=("k_proj", "v_proj"))
    assert plan.modules == ("k_proj", "v_proj")
    assert all(plan.ranks[module].tolist() == [1, 2, 3] for module in plan.modules)
    assert plan.max_rank == 3


def test_a_mapping_holds_module_by_module_and_the_rest_is_zero(tmp_path):
    targets = ("q_proj", "k_proj", "up_proj")
    raw = {"ranks": {"up_proj": [4, 0, 2], "q_proj": [1, 1, 1]}}
    plan = read(tmp_path, raw, target_modules=targets)
    assert plan.modules == targets
    assert plan.ranks["k_proj"].tolist() == [0, 0, 0]
    assert plan.ranks["up_proj"].tolist() == [4, 0, 2]
    assert plan.scales()["k_proj"].tolist() == [0, 0, 0]


def test_the_scale_quotes_alpha_at_the_reference_rank_whatever_the_plan(tmp_path):
    plan = read(tmp_path, [1, 64, 7], rank=16, alpha=32.0)
    assert plan.scales()["q_proj"].tolist() == [2.0, 2.0, 2.0]


def test_a_larger_max_rank_only_widens_the_mask(tmp_path):
    narrow, wide = read(tmp_path, [1, 2, 3]), read(tmp_path, [1, 2, 3], max_rank=8)
    assert wide.max_rank == 8 and wide.total_rank == narrow.total_rank
    mask = wide.masks()["q_proj"]
    np.testing.assert_array_equal(mask[:, :3], narrow.masks()["q_proj"])
    assert not mask[:, 3:].any()


def test_a_budget_is_a_bound_and_not_a_target(tmp_path):
    settings = {"target_modules": ("q_proj", "k_proj")}
    assert read(tmp_path, [1, 2, 3], rank_budget=12, **settings).total_rank == 12
    assert read(tmp_path, [1, 2, 3], rank_budget=500, **settings).total_rank == 12
    with pytest.raises(ConfigError, match=r"spends 12 ranks over 3 layers x 2 modules.*budget=11"):
        read(tmp_path, [1, 2, 3], rank_budget=11, **settings)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, "needs at least one module"),
        ({"q_proj": [1, 2], "k_proj": [1]}, r"different layer counts \[1, 2\]"),
        ({"q_prj": [1]}, "unknown module 'q_prj'; did you mean 'q_proj'"),
        ({"q_proj": [1, -2]}, "q_proj has the negative rank -2"),
        ({"q_proj": [1, 9]}, "q_proj in layer 1 has rank 9, more than max_rank 8"),
        ({"q_proj": [0, 0]}, "every rank is 0"),
        ({"q_proj": []}, "needs at least one layer"),
    ],
)
def test_an_impossible_plan_is_refused(ranks, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(ranks)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "is not readable JSON"),
        ("{}", 'needs "ranks"'),
        ("3", 'needs "ranks"'),
        ({"ranks": {}}, 'needs "ranks"'),
        ({"ranks": "1 2 3"}, 'needs "ranks"'),
        ({"ranks": {"o_proj": [1, 2, 3]}}, "which lora.target_modules does not hold"),
        ({"ranks": {"q_porj": [1, 2, 3]}}, "did you mean 'q_proj'"),
        ({"ranks": [1, 2.5, 3]}, "the ranks of q_proj must be whole numbers"),
        ({"ranks": [1, True, 3]}, "must be whole numbers"),
        ({"ranks": {"q_proj": 3}}, "the ranks of q_proj must be a list of numbers"),
        ({"ranks": [1, 2]}, "gives q_proj 2 ranks; the model has 3 layers"),
        ({"ranks": []}, "gives q_proj 0 ranks; the model has 3 layers"),
        ({"ranks": [0, 0, 0]}, "every rank is 0"),
        ({"ranks": [1, -1, 0]}, "negative rank -1"),
        ({"ranks": [1, 10**30, 0]}, "q_proj has a rank beyond"),
        ({"ranks": [1, 2**16 + 1, 0]}, "q_proj has a rank beyond"),
    ],
)
def test_a_bad_plan_file_is_told_in_one_line(tmp_path, raw, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, raw, target_modules=("q_proj", "k_proj"))
    assert "\n" not in str(caught.value)


def test_a_missing_plan_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json does not exist"):
        make_rank_plan(LoraConfig(plan=str(tmp_path / "nowhere.json")), 3)


def test_a_plan_wider_than_max_rank_says_what_to_raise(tmp_path):
    with pytest.raises(ConfigError, match=r"raise lora\.max_rank to 3"):
        read(tmp_path, [1, 2, 3], max_rank=2)


def test_scales_multiply_what_the_rule_gives(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"ranks": [2, 4], "scales": {"q_proj": [0.5, 2.0]}}))
    for rule, by_rule in (("constant", [2, 2]), ("alpha_over_r", [4, 2])):
        config = LoraConfig(
            rank=4, alpha=8, plan=str(path), scale_rule=rule, target_modules=("q_proj", "v_proj")
        )
        plan = make_rank_plan(config, 2)
        np.testing.assert_allclose(plan.scales()["q_proj"], np.array(by_rule) * [0.5, 2])
        np.testing.assert_allclose(plan.scales()["v_proj"], by_rule)
        again = RankPlan.from_json(json.loads(json.dumps(plan.to_json())))
        np.testing.assert_array_equal(again.scales()["q_proj"], plan.scales()["q_proj"])
        np.testing.assert_array_equal(again.scales()["v_proj"], plan.scales()["v_proj"])


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([1.0], "1 scales; the model has 2 layers"),
        ([1.0, -1.0], "must be positive numbers"),
        ([1.0, float("inf")], "must be positive numbers"),
        (["1", 2], "must be numbers"),
        (1.0, 'needs "scales"'),
        ({"q_proy": [1, 1]}, "did you mean 'q_proj'?"),
    ],
)
def test_mistakes_in_scales_are_told(tmp_path, scales, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"ranks": [2, 4], "scales": scales}))
    with pytest.raises(ConfigError) as error:
        make_rank_plan(LoraConfig(plan=str(path)), 2)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_plan_command_keeps_scales(tmp_path, monkeypatch):
    from jaxgrpo.run import main

    monkeypatch.chdir(tmp_path)
    scales = {"q_proj": [0.5] * 8}
    (tmp_path / "plan.json").write_text(json.dumps({"ranks": [2] * 8, "scales": scales}))
    assert main(["plan", "lora.plan=plan.json", "q_proj.3=4", "out=new.json"]) == 0
    written = json.loads((tmp_path / "new.json").read_text())
    assert written["scales"] == scales and written["ranks"]["q_proj"][3] == 4

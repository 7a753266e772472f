"""Plans that move: what stays computes the same, what is born adds nothing, nothing recompiles."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.config import OptimConfig
from jaxgrpo.grpo.optimizer import Schedule, make_optimizer
from jaxgrpo.grpo.step import init_train_state
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.study.dynamic import (
    adalora_replan,
    adaptive_replan,
    move_ranks,
    para_replan,
    rank_scores,
    rank_sizes,
    uniform_cut_replan,
)

SHAPES = {"q_proj": (6, 6), "down_proj": (8, 6)}
LAYERS, WIDTH = 3, 4


def make_plan(q_proj, down_proj, rule="constant"):
    ranks = {"q_proj": np.array(q_proj), "down_proj": np.array(down_proj)}
    return RankPlan(ranks, WIDTH, alpha=6.0, scale_rule=rule, reference_rank=2)


def make_state(plan, seed=0, track_sensitivity=False):
    """Adapters, moments and statistics in mid-training: numbers everywhere, also off the plan."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    lora = {
        m: {"a": draw((LAYERS, i, WIDTH)), "b": draw((LAYERS, WIDTH, o))}
        for m, (i, o) in SHAPES.items()
    }
    state = init_train_state(lora, make_optimizer(OptimConfig()), track_sensitivity)

    def fill(leaf):
        return jnp.abs(draw(leaf.shape)) if jnp.ndim(leaf) == 3 else leaf

    return dataclasses.replace(
        state,
        opt_state=jax.tree.map(fill, state.opt_state),
        sensitivity=jax.tree.map(fill, state.sensitivity),
    )


def deltas(lora, plan):
    """module -> scale * A B with the plan's masks, [L, in, out], float64."""
    masks, scales = plan.masks(), plan.scales()
    return {
        m: np.einsum(
            "lir,lr,lro,l->lio",
            np.asarray(pair["a"], np.float64),
            masks[m],
            np.asarray(pair["b"], np.float64),
            scales[m],
        )
        for m, pair in lora.items()
    }


@pytest.mark.parametrize("rule", ["constant", "rslora", "alpha_over_r"])
def test_ranks_that_are_born_change_no_output(rule):
    old, new = make_plan([2, 1, 0], [3, 2, 1], rule), make_plan([4, 1, 2], [3, 4, 2], rule)
    state = make_state(old)
    moved = move_ranks(state, old, new, rank_sizes(state.lora, old))
    before, after = deltas(state.lora, old), deltas(moved.lora, new)
    chex.assert_trees_all_close(after, before, rtol=1e-5, atol=1e-6)
    # Newborn ranks have an A to learn with and a B of exactly 0.
    assert (np.asarray(moved.lora["q_proj"]["b"])[0, 2:] == 0).all()
    assert (np.asarray(moved.lora["q_proj"]["a"])[0, :, 2:] != 0).all()


@pytest.mark.parametrize("rule", ["constant", "rslora", "alpha_over_r"])
def test_the_best_ranks_stay_and_add_what_they_did(rule):
    old, new = make_plan([4, 3, 2], [4, 4, 4], rule), make_plan([2, 3, 0], [1, 4, 2], rule)
    state = make_state(old)
    sizes = rank_sizes(state.lora, old)
    moved = move_ranks(state, old, new, sizes)
    after = deltas(moved.lora, new)
    for module in SHAPES:
        a = np.asarray(state.lora[module]["a"], np.float64)
        b = np.asarray(state.lora[module]["b"], np.float64)
        scales = old.scales()[module]
        for layer in range(LAYERS):
            best = np.argsort(-sizes[module][layer])[: new.ranks[module][layer]]
            expected = scales[layer] * a[layer][:, best] @ b[layer][best]
            np.testing.assert_allclose(after[module][layer], expected, rtol=1e-5, atol=1e-6)


def test_moments_travel_with_their_ranks_and_die_with_them():
    old, new = make_plan([4, 4, 4], [4, 4, 4]), make_plan([2, 4, 1], [3, 4, 4])
    state = make_state(old, track_sensitivity=True)
    # Where A holds its own number, its moments hold the same: so they must still agree afterwards.
    lora = state.lora

    def tagged(node):
        return lora if jax.tree.structure(node) == jax.tree.structure(lora) else node

    def is_tree(node):
        return jax.tree.structure(node) == jax.tree.structure(lora)

    # Of the factor between them, the sum of A's column stands for its statistics.
    seen = {m: {**pair, "e": pair["a"].sum(axis=1)} for m, pair in lora.items()}
    state = dataclasses.replace(
        state,
        opt_state=jax.tree.map(tagged, state.opt_state, is_leaf=is_tree),
        sensitivity={"mean": seen, "uncertainty": seen},
    )
    moved = move_ranks(state, old, new, rank_sizes(state.lora, old))
    trees = [n for n in jax.tree.leaves(moved.opt_state, is_leaf=is_tree) if is_tree(n)]
    trees += list(moved.sensitivity.values())
    assert len(trees) == 4
    masks = new.masks()
    for tree in trees:
        for module in SHAPES:
            alive = masks[module]
            np.testing.assert_array_equal(
                np.asarray(tree[module]["a"]),
                np.asarray(moved.lora[module]["a"]) * alive[:, None, :],
            )
            np.testing.assert_array_equal(
                np.asarray(tree[module]["b"]), np.asarray(moved.lora[module]["b"])
            )
            if "e" in tree[module]:
                # Sums of float32 in another order: 1e-6.
                column = np.asarray(tree[module]["a"]).sum(axis=1)
                np.testing.assert_allclose(tree[module]["e"], column, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [20, 100, 500])
def test_a_newborn_rank_takes_no_larger_steps_than_an_old_one(steps):
    """Adam under a steady gradient: with zeroed moments a newborn's update peaks at 1.25, 2.1 and
    4.1 times an old one's after 20, 100 and 500 steps, because the bias correction goes on."""
    old, new = make_plan([2, 1, 2], [2, 2, 0]), make_plan([4, 3, 2], [3, 2, 2])
    state = make_state(old)
    optimizer = make_optimizer(OptimConfig(weight_decay=0.0, max_grad_norm=0.0))
    schedule = Schedule(jnp.float32(1e-5), jnp.float32(10**6))
    rng = np.random.default_rng(0)
    # Of one size along the ranks of an adapter, of its own for every feature.
    steady = {
        m: {
            "a": jnp.asarray(rng.normal(size=(LAYERS, i, 1)) + jnp.zeros((LAYERS, i, WIDTH))),
            "b": jnp.asarray(rng.normal(size=(LAYERS, 1, o)) + jnp.zeros((LAYERS, WIDTH, o))),
        }
        for m, (i, o) in SHAPES.items()
    }

    def masked(plan):
        masks = plan.masks()
        return {
            m: {"a": x["a"] * masks[m][:, None, :], "b": x["b"] * masks[m][:, :, None]}
            for m, x in steady.items()
        }

    @jax.jit
    def step(opt_state, grads):
        return optimizer.update(grads, opt_state, state.lora, schedule=schedule)

    opt_state, before = optimizer.init(state.lora), masked(old)
    for _ in range(steps):
        _, opt_state = step(opt_state, before)
    state = dataclasses.replace(state, opt_state=opt_state)
    moved = move_ranks(state, old, new, rank_sizes(state.lora, old))
    opt_state, after = moved.opt_state, masked(new)
    for age in range(60):
        updates, opt_state = step(opt_state, after)
        # Old rank 0 and newborn rank 2 of the first layer; rounding 1e-5.
        a, b = (np.abs(np.asarray(updates["q_proj"][side][0])) for side in ("a", "b"))
        assert (a[:, 2:] <= a[:, :1] * (1 + 1e-5)).all() and (b[2:] <= b[:1] * (1 + 1e-5)).all()
        assert age < 30 or (a[:, 2] > 0.9 * a[:, 0]).all(), "and it does learn"
    # An adapter that had no rank takes the mean of its module.
    assert (np.asarray(updates["down_proj"]["a"][2, :, 0]) != 0).all()


@pytest.mark.parametrize("rule", ["rslora", "alpha_over_r"])
def test_moments_are_rescaled_as_the_gradient_of_b_is(rule):
    """Where B grows by the quotient of the scales, its gradient falls by it: first moments by the
    quotient, second by its square, so that the next update in units of B is no other."""
    old, new = make_plan([4, 4, 4], [4, 4, 4], rule), make_plan([2, 4, 1], [3, 4, 4], rule)
    state = make_state(old)
    moved = move_ranks(state, old, new, rank_sizes(state.lora, old))
    before, after = (optax.tree.get(s.opt_state, "mu") for s in (state, moved))
    second, now = (optax.tree.get(s.opt_state, "nu") for s in (state, moved))
    ratio = old.scales()["q_proj"][0] / new.scales()["q_proj"][0]
    best = np.argsort(-rank_sizes(state.lora, old)["q_proj"][0])[:2]
    for power, one, other in ((1, before, after), (2, second, now)):
        np.testing.assert_allclose(
            other["q_proj"]["b"][0][:2], one["q_proj"]["b"][0][best] / ratio**power, rtol=1e-6
        )
        np.testing.assert_array_equal(
            other["q_proj"]["a"][0][:, :2], one["q_proj"]["a"][0][:, best]
        )


def test_a_moved_state_is_the_same_to_a_compiled_program():
    """Shapes, types, placement and structure stay, so the train step does not recompile."""
    old, new = make_plan([4, 2, 2], [2, 2, 2]), make_plan([1, 4, 3], [2, 2, 2])
    state = jax.device_put(make_state(old, track_sensitivity=True), jax.devices()[0])
    moved = move_ranks(state, old, new, rank_sizes(state.lora, old))
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, state)
    identity = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 0, tree))
    identity(state)
    identity(moved)
    assert identity._cache_size() == 1


def test_adalora_falls_to_its_budget_and_stays():
    plan = make_plan([4] * 3, [4] * 3)
    state = make_state(plan, track_sensitivity=True)
    replan = adalora_replan(50, 2, dict.fromkeys(SHAPES, 1))
    totals = []
    for done in range(1, 51):
        found = replan(done, state, plan)
        if found:
            before = rank_scores(state.sensitivity, plan)
            state, plan = found
            kept = np.sort(np.concatenate([s[s >= 0] for s in before.values()]))
            after = rank_scores(state.sensitivity, plan)
            survivors = np.sort(np.concatenate([s[s >= 0] for s in after.values()]))
            np.testing.assert_allclose(survivors, kept[-len(survivors) :], rtol=1e-5)
        totals.append(plan.total_rank)
    assert totals[0] == 24 and totals[-1] == 12
    assert (np.diff(totals) <= 0).all()
    assert len(set(totals)) > 3, "in steps, not at once"
    assert totals[35] == 12, "the last three tenths keep their ranks"


def write_norms(path, hot_layer, scale=1.0):
    """Four steps in which one layer's rank-free norms are three times the others'."""
    ones = [3.0 * scale if layer == hot_layer else scale for layer in range(LAYERS)]
    view = {m: {"a": ones, "b": ones} for m in SHAPES}
    lines = [json.dumps({"step": step, "rank_free": view}) for step in range(1, 5)]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_adaptive_follows_the_norms_at_one_budget(tmp_path, unit):
    norms = tmp_path / "norms.jsonl"
    write_norms(norms, hot_layer=1)
    bounds = {"unit": unit, "granularity": "layer", "min_rank": 1, "max_rank": 4}
    replan = adaptive_replan(norms, 2, 4, SHAPES, bounds)
    plan = make_plan([2, 2, 2], [2, 2, 2])
    state = make_state(plan)
    assert replan(1, state, plan) is None
    moved, new = replan(2, state, plan)
    assert new.ranks["q_proj"].tolist() == [1, 4, 1]
    assert new.total_rank == plan.total_rank
    assert new.trainable_parameters(SHAPES) == plan.trainable_parameters(SHAPES)
    layer = deltas(moved.lora, new)["q_proj"][1]
    np.testing.assert_allclose(layer, deltas(state.lora, plan)["q_proj"][1], rtol=1e-5, atol=1e-6)
    # A move after the last step would be evaluated before it could learn anything.
    assert replan(4, state, plan) is None
    write_norms(norms, hot_layer=1, scale=0.0)
    assert replan(2, state, plan) is None, "without a gradient there is nothing to move by"


PARAMETERS = {module: sum(shape) for module, shape in SHAPES.items()}


def test_adalora_ends_at_the_parameters_of_the_target_rank():
    """Its ranks are worth 12 or 14 parameters; a sum of ranks would be another number of them."""
    for seed in range(5):
        plan = make_plan([3] * 3, [3] * 3)
        state = make_state(plan, seed, track_sensitivity=True)
        replan = adalora_replan(50, 2, PARAMETERS)
        spent = []
        for done in range(1, 51):
            found = replan(done, state, plan)
            state, plan = found or (state, plan)
            spent.append(plan.trainable_parameters(SHAPES))
        assert spent[0] == 3 * LAYERS * 26 and spent[-1] == 2 * LAYERS * 26
        assert (np.diff(spent) <= 0).all()
        assert len({int(r) for ranks in plan.ranks.values() for r in ranks}) > 1


@pytest.mark.parametrize("rule", ["constant", "rslora", "alpha_over_r"])
def test_para_and_its_control_end_at_the_parameters_of_the_target_rank(rule):
    """PARA's cut is global, the control's the best `target_rank` of every adapter; both exact."""
    for seed in range(5):
        plan = make_plan([4] * 3, [4] * 3, rule)
        state = make_state(plan, seed)
        _, cut = para_replan(7, 2, PARAMETERS)(7, state, plan)
        assert cut.trainable_parameters(SHAPES) == 2 * LAYERS * 26
        control = uniform_cut_replan(7, 2)
        assert control(6, state, plan) is None
        moved, uniform = control(7, state, plan)
        assert {int(r) for ranks in uniform.ranks.values() for r in ranks} == {2}
        assert uniform.trainable_parameters(SHAPES) == cut.trainable_parameters(SHAPES)
        for module, stack in deltas(state.lora, plan).items():
            u, s, v = np.linalg.svd(stack)
            best = (u[:, :, :2] * s[:, None, :2]) @ v[:, :2]
            after = deltas(moved.lora, uniform)[module]
            np.testing.assert_allclose(after, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["constant", "rslora", "alpha_over_r"])
def test_para_cuts_once_and_keeps_the_largest_singular_values(rule):
    plan = make_plan([4] * 3, [4] * 3, rule)
    state = make_state(plan)
    replan = para_replan(7, 2, dict.fromkeys(SHAPES, 1))
    assert replan(6, state, plan) is None
    moved, new = replan(7, state, plan)
    assert new.total_rank == 12
    values = {
        (m, layer): np.linalg.svd(delta)
        for m, stack in deltas(state.lora, plan).items()
        for layer, delta in enumerate(stack)
    }
    cut = np.sort(np.concatenate([s[:4] for _, s, _ in values.values()]))[-12]
    after = deltas(moved.lora, new)
    for (module, layer), (u, s, v) in values.items():
        kept = s >= cut * (1 - 1e-6)
        kept[4:] = False
        assert kept.sum() == new.ranks[module][layer]
        expected = (u[:, : len(s)][:, kept] * s[kept]) @ v[: len(s)][kept]
        np.testing.assert_allclose(after[module][layer], expected, rtol=1e-4, atol=1e-5)
    assert replan(7, moved, new) is None

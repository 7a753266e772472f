"""The three views of the per-layer gradient norms."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.grpo.layer_grad_norms import VIEWS, layer_grad_norms
from jaxgrpo.model.api import device_plan
from jaxgrpo.rank_plan import RankPlan

LAYERS, MAX_RANK = 3, 4
FEATURES = {"q_proj": (6, 5), "down_proj": (8, 7)}
RANKS = {"q_proj": np.array([4, 0, 1]), "down_proj": np.array([2, 3, 0])}


def make_plan(scale_rule: str) -> RankPlan:
    return RankPlan(RANKS, MAX_RANK, alpha=8.0, scale_rule=scale_rule, reference_rank=2)  # type: ignore[arg-type]


def make_grads(plan: RankPlan):
    """Random gradients, 0 on the padding as the model's are."""
    rng = np.random.default_rng(0)
    grads = {}
    for module, mask in plan.masks().items():
        wide_in, wide_out = FEATURES[module]
        a = rng.normal(size=(LAYERS, wide_in, MAX_RANK)) * mask[:, None, :]
        b = rng.normal(size=(LAYERS, MAX_RANK, wide_out)) * mask[:, :, None]
        grads[module] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return grads


def test_squares_of_l2_sum_to_the_global_norm_squared():
    plan = make_plan("constant")
    grads = make_grads(plan)
    norms = layer_grad_norms(grads, device_plan(plan))["l2"]
    total = sum(float(jnp.sum(side**2)) for module in norms.values() for side in module.values())
    np.testing.assert_allclose(total, float(optax.tree.norm(grads)) ** 2, rtol=1e-5)


@pytest.mark.parametrize("scale_rule", ["constant", "rslora", "alpha_over_r"])
def test_views_by_numpy_on_the_unpadded_matrices(scale_rule):
    plan = make_plan(scale_rule)
    grads = make_grads(plan)
    norms = layer_grad_norms(grads, device_plan(plan))
    assert tuple(norms) == VIEWS
    scales = plan.scales()
    for module, ranks in RANKS.items():
        for layer, rank in enumerate(ranks):
            if rank == 0:
                continue
            a = np.asarray(grads[module]["a"])[layer, :, :rank]
            b = np.asarray(grads[module]["b"])[layer, :rank]
            for side, matrix in (("a", a), ("b", b)):
                l2 = np.sqrt((matrix**2).sum())
                got = {view: float(norms[view][module][side][layer]) for view in VIEWS}
                expected = {
                    "l2": l2,
                    "rms": np.sqrt((matrix**2).mean()),
                    "rank_free": l2 / (scales[module][layer] * np.sqrt(rank)),
                }
                for view in VIEWS:
                    np.testing.assert_allclose(got[view], expected[view], rtol=1e-5)


def test_rank_zero_reads_zero_in_every_view():
    plan = make_plan("alpha_over_r")
    norms = layer_grad_norms(make_grads(plan), device_plan(plan))
    chex.assert_tree_all_finite(norms)
    for view in VIEWS:
        for module, ranks in RANKS.items():
            for side in ("a", "b"):
                reading = np.asarray(norms[view][module][side])
                np.testing.assert_array_equal(reading == 0.0, ranks == 0)


def test_rank_free_does_not_see_the_scale_of_the_adapter():
    """dL/dA and dL/dB carry the scale as a factor; the view takes it out."""
    small, large = make_plan("constant"), make_plan("constant")
    large = RankPlan(
        RANKS, MAX_RANK, alpha=3 * small.alpha, scale_rule="constant", reference_rank=2
    )
    grads = make_grads(small)
    tripled = {m: {side: 3 * g for side, g in ab.items()} for m, ab in grads.items()}
    chex.assert_trees_all_close(
        layer_grad_norms(grads, device_plan(small))["rank_free"],
        layer_grad_norms(tripled, device_plan(large))["rank_free"],
        rtol=1e-5,
    )

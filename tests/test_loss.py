"""The losses by hand and by their invariants. Parity: parity/test_trl.py."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import Correction, GrpoConfig, LossName
from jaxgrpo.grpo.loss import importance_weights, loss_metrics, token_losses, token_weights
from jaxgrpo.types import TrainBatch

LOSSES = typing.get_args(LossName)
MASK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], np.float32)


def make_batch(**changes: Any) -> tuple[jax.Array, Any]:
    """Log-probs now, and four rows of up to three tokens that were sampled by a near policy."""
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(1.0, MASK.shape).astype(np.float32)

    def near() -> jax.Array:
        return jnp.asarray(logprobs + 0.3 * rng.normal(size=MASK.shape).astype(np.float32))

    batch = TrainBatch(
        loss_mask=jnp.asarray(MASK),
        advantages=jnp.array([1.0, -1.0, 0.5, -0.5]),
        sampler_logprobs=near(),
        trained=jnp.ones(len(MASK), bool),
        packing=None,  # type: ignore[arg-type]  # what tokens the rows have is nothing to a loss
        old_logprobs=near(),
        ref_logprobs=near(),
    )
    return jnp.asarray(logprobs), dataclasses.replace(batch, **changes)


def make_config(loss: LossName, **changes: Any) -> GrpoConfig:
    return GrpoConfig(loss=loss, clip_eps_high=2.0 if loss == "cispo" else None, **changes)


def total_loss(config: GrpoConfig, logprobs: jax.Array, batch: TrainBatch) -> jax.Array:
    weights = token_weights(config.loss, batch.loss_mask, MASK.shape[1])
    return jnp.sum(weights * token_losses(config, logprobs, batch))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("grpo", [[1 / 8, 1 / 8, 0], [1 / 4, 0, 0], [0, 0, 0], [1 / 12, 1 / 12, 1 / 12]]),
        ("gspo", [[1 / 8, 1 / 8, 0], [1 / 4, 0, 0], [0, 0, 0], [1 / 12, 1 / 12, 1 / 12]]),
        ("dr_grpo", MASK / (4 * 10)),
        ("bnpo", MASK / 6),
        ("dapo", MASK / 6),
        ("cispo", MASK / 6),
    ],
)
def test_token_weights_by_hand(loss, expected):
    weights = token_weights(loss, jnp.asarray(MASK), 10)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_learn_from_is_zero_and_not_nan(loss):
    config = make_config(loss, kl_coef=0.1)
    logprobs, batch = make_batch(loss_mask=jnp.zeros(MASK.shape))
    value, gradient = jax.value_and_grad(total_loss, argnums=1)(config, logprobs, batch)
    metrics = loss_metrics(config, logprobs, -logprobs, batch)
    chex.assert_tree_all_finite((value, gradient, metrics))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_first_update_is_the_policy_gradient(loss):
    """At ratio 1 every loss has the gradient of -sum(weight * advantage * log-prob)."""
    config = make_config(loss, importance_correction="none")
    logprobs, batch = make_batch(old_logprobs=None)
    gradient = jax.grad(total_loss, argnums=1)(config, logprobs, batch)
    weights = token_weights(loss, batch.loss_mask, MASK.shape[1])
    np.testing.assert_allclose(gradient, -weights * batch.advantages[:, None], atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("correction", typing.get_args(Correction))
def test_masked_tokens_change_nothing_even_when_extreme(loss, correction):
    config = make_config(loss, importance_correction=correction, kl_coef=0.1)
    logprobs, batch = make_batch()
    garbage = jnp.where(batch.loss_mask > 0, 0.0, jnp.array([[1e4, -1e4, 1e4]]))
    noisy = dataclasses.replace(
        batch,
        sampler_logprobs=batch.sampler_logprobs - garbage,
        old_logprobs=batch.old_logprobs - 2 * garbage,
        ref_logprobs=batch.ref_logprobs + 3 * garbage,
    )
    graded = jax.value_and_grad(total_loss, argnums=1)
    clean = (graded(config, logprobs, batch), loss_metrics(config, logprobs, -logprobs, batch))
    logprobs = logprobs + garbage
    dirty = (graded(config, logprobs, noisy), loss_metrics(config, logprobs, -logprobs, noisy))
    chex.assert_trees_all_equal(clean, dirty)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_are_independent_given_the_weights(loss):
    """What micro-batching rests on."""
    config = make_config(loss, kl_coef=0.1, importance_correction="sequence_truncate")
    logprobs, batch = make_batch()
    whole = token_losses(config, logprobs, batch)
    for row in range(len(MASK)):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (logprobs, batch))
        np.testing.assert_allclose(token_losses(config, *alone), whole[row : row + 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [(1.0, 1.1, True), (1.0, 1.4, False), (1.0, 0.5, True), (-1.0, 1.4, True), (-1.0, 0.7, False)],
)
def test_clip_stops_the_gradient_on_the_far_side_only(advantage, ratio, moves):
    config = GrpoConfig(clip_eps_low=0.2, clip_eps_high=0.3, importance_correction="none")
    logprobs, batch = make_batch(advantages=jnp.full((4,), advantage))
    batch = dataclasses.replace(batch, old_logprobs=logprobs - np.log(ratio))
    gradient = jax.grad(total_loss, argnums=1)(config, logprobs, batch)
    assert bool(jnp.any(gradient != 0)) == moves
    metrics = loss_metrics(config, logprobs, -logprobs, batch)
    assert metrics["clip_ratio/region_mean"] == (0.0 if moves else 1.0)
    side = "high_mean" if advantage > 0 else "low_mean"
    assert metrics[f"clip_ratio/{side}"] == (0.0 if moves else 1.0)


def test_delta_bounds_the_loss_of_bad_tokens_that_became_likely():
    logprobs, batch = make_batch(advantages=-jnp.ones((4,)))
    batch = dataclasses.replace(batch, old_logprobs=logprobs - np.log(50.0))
    plain = GrpoConfig(importance_correction="none")
    bounded = dataclasses.replace(plain, delta=4.0)
    np.testing.assert_allclose(total_loss(plain, logprobs, batch), 50.0, rtol=1e-5)
    np.testing.assert_allclose(total_loss(bounded, logprobs, batch), 4.0, rtol=1e-5)


def test_cispo_keeps_the_gradient_of_clipped_tokens_at_the_cap():
    config = GrpoConfig(loss="cispo", clip_eps_high=2.0, importance_correction="none")
    logprobs, batch = make_batch(advantages=jnp.ones((4,)))
    batch = dataclasses.replace(batch, old_logprobs=logprobs - np.log(50.0))
    gradient = jax.grad(total_loss, argnums=1)(config, logprobs, batch)
    np.testing.assert_allclose(gradient, -2.0 * MASK / MASK.sum(), rtol=1e-6)
    metrics = loss_metrics(config, logprobs, -logprobs, batch)
    assert metrics["cispo_clip_ratio"] == 1.0


def test_gspo_gives_every_token_of_a_row_the_same_ratio():
    config = GrpoConfig(loss="gspo", importance_correction="none", clip_eps_low=0.9)
    logprobs, batch = make_batch()
    losses = np.asarray(token_losses(config, logprobs, batch))
    assert (losses == losses[:, :1]).all()
    difference = np.asarray(logprobs - batch.old_logprobs)
    mean = (difference * MASK).sum(1) / np.maximum(MASK.sum(1), 1)
    np.testing.assert_allclose(losses[:, 0], -np.exp(mean) * batch.advantages, rtol=1e-5)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("token_truncate", [[0.5, 2.0], [1.0, 1.5]]),
        ("token_mask", [[0.5, 0.0], [1.0, 1.5]]),
        ("sequence_truncate", [[2.0], [1.5]]),
        ("sequence_mask", [[0.0], [1.5]]),
        ("none", [[1.0, 1.0], [1.0, 1.0]]),
    ],
)
def test_importance_weights_by_hand(correction, expected):
    difference = jnp.log(jnp.array([[0.5, 8.0], [1.0, 1.5]]))
    weights = importance_weights(
        correction, 2.0, difference - 1.0, jnp.full((2, 2), -1.0), jnp.ones((2, 2))
    )
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_importance_weight_scales_the_policy_term_but_not_the_kl():
    config = GrpoConfig(importance_correction="token_mask", importance_cap=1.5, kl_coef=0.5)
    logprobs, batch = make_batch()
    batch = dataclasses.replace(batch, sampler_logprobs=batch.old_logprobs - 1.0)
    only_kl = token_losses(config, logprobs, batch) * MASK
    difference = np.asarray(batch.ref_logprobs - logprobs)
    expected = 0.5 * (np.exp(difference) - difference - 1.0) * MASK
    np.testing.assert_allclose(only_kl, expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(only_kl) >= 0).all()


def test_drift_is_between_sampler_and_trainer_at_sampling_time():
    logprobs, batch = make_batch()
    batch = dataclasses.replace(batch, sampler_logprobs=batch.old_logprobs - 0.25 * MASK)
    for correction in typing.get_args(Correction):
        config = GrpoConfig(importance_correction=correction)
        metrics = loss_metrics(config, logprobs, -logprobs, batch)
        for name in ("mean", "max"):
            key = f"sampling/sampling_logp_difference/{name}"
            np.testing.assert_allclose(metrics[key], 0.25, rtol=1e-5)

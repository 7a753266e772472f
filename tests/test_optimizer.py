"""The learning rate's schedule, gradient clipping."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.config import OptimConfig
from jaxgrpo.grpo.optimizer import Schedule, learning_rate_at, learning_rate_in, make_optimizer


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_follows_the_schedule(schedule):
    config = OptimConfig(learning_rate=0.5, schedule=schedule, warmup_steps=3)
    schedule_of_10 = Schedule(jnp.float32(0.5), jnp.float32(10))
    rates = [float(learning_rate_at(config, schedule_of_10, step)) for step in range(11)]
    np.testing.assert_allclose(rates[:4], [0.125, 0.25, 0.375, 0.5], rtol=1e-6)
    middle = {
        "constant": 0.5,
        "linear": 0.5 * 3 / 7,
        "cosine": 0.5 * (1 + np.cos(np.pi * 4 / 7)) / 2,
    }
    np.testing.assert_allclose(rates[7], middle[schedule], rtol=1e-5)
    np.testing.assert_allclose(rates[10], 0.5 if schedule == "constant" else 0.0, atol=1e-7)


def test_clipping_bounds_what_adam_sees_but_not_what_is_reported():
    gradient = {"w": jnp.full((4,), 100.0)}
    for bound, norm in ((1.0, 1.0), (0.0, 200.0)):
        optimizer = make_optimizer(OptimConfig(max_grad_norm=bound))
        schedule = Schedule(jnp.float32(1e-4), jnp.float32(1))
        state = optimizer.init(gradient)
        _, state = optimizer.update(gradient, state, gradient, schedule=schedule)
        first_moment = optax.tree.get(state, "mu")
        np.testing.assert_allclose(optax.tree.norm(first_moment), 0.1 * norm, rtol=1e-5)


def test_an_optimizer_without_a_schedule_reports_no_learning_rate():
    assert learning_rate_in(optax.sgd(0.1).init({"w": jnp.zeros(2)})) is None

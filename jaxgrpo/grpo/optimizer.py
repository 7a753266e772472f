"""AdamW with a warmup and decay schedule, and the learning rate it used."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxgrpo.config import Config, OptimConfig


class Schedule(NamedTuple):
    """What of a learning rate's schedule is an argument of the compiled step, so that another one
    compiles nothing; its form and its warmup are the program's.

    Attributes:
        peak: the learning rate that it warms up to.
        total_updates: of the whole run.
    """

    peak: Float[Array, ""]
    total_updates: Float[Array, ""]

    @classmethod
    def of(cls, config: Config) -> Schedule:
        """A run's."""
        updates = config.steps * config.grpo.num_iterations
        return cls(jnp.float32(config.optim.learning_rate), jnp.float32(updates))


def learning_rate_at(
    config: OptimConfig, schedule: Schedule, step: int | Int[Array, ""]
) -> Float[Array, ""]:
    """The learning rate of update `step` (from 0); of `config` the form and the warmup.

    Warmup rises by equal parts and reaches the peak at update `warmup_steps`; its first update is
    one part, not 0, which would waste a rollout. Then the schedule holds, or falls to where the
    update after the last would have 0.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = config.warmup_steps
    rise = jnp.minimum((step + 1.0) / (warmup + 1.0), 1.0)
    left = jnp.maximum(schedule.total_updates - warmup, 1.0)
    progress = jnp.clip((step - warmup) / left, 0.0, 1.0)
    if config.schedule == "linear":
        fall = 1.0 - progress
    elif config.schedule == "cosine":
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    else:
        fall = jnp.ones_like(progress)
    return schedule.peak * rise * fall


def make_optimizer(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping (if on), then AdamW (arXiv:1711.05101); `update` takes a `schedule`.

    The learning rate in use is kept in the optimizer's state, where `learning_rate_in` finds it.
    """
    fixed = {
        "b1": config.b1,
        "b2": config.b2,
        "eps": config.eps,
        "eps_root": 0.0,
        "weight_decay": config.weight_decay,
    }

    def at(schedule: Schedule) -> optax.GradientTransformation:
        adamw = optax.inject_hyperparams(optax.adamw, static_args=tuple(fixed))(
            learning_rate=lambda step: learning_rate_at(config, schedule, step), **fixed
        )
        if config.max_grad_norm == 0:
            return optax.chain(adamw)
        return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)

    def init(params: Any) -> optax.OptState:
        return at(Schedule(jnp.float32(0), jnp.float32(0))).init(params)

    def update(
        updates: Any, state: optax.OptState, params: Any = None, *, schedule: Schedule, **_: Any
    ) -> tuple[Any, optax.OptState]:
        return at(schedule).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def learning_rate_in(opt_state: optax.OptState) -> Float[Array, ""] | None:
    """The learning rate of the update that made this state; None for an optimizer without one."""
    found = optax.tree.get_all_with_path(
        opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )
    return found[0][1] if found else None

"""AdamW with a warmup and decay schedule, and the learning rate it used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxgrpo.config import OptimConfig


def learning_rate_at(
    config: OptimConfig, total_updates: int, step: int | Int[Array, ""]
) -> Float[Array, ""]:
    """The learning rate of update `step` (from 0).

    Warmup rises by equal parts and reaches the peak at update `warmup_steps`; its first update is
    one part, not 0, which would waste a rollout. Then the schedule holds, or falls to where the
    update after the last would have 0.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = config.warmup_steps
    rise = jnp.minimum((step + 1.0) / (warmup + 1.0), 1.0)
    progress = jnp.clip((step - warmup) / max(total_updates - warmup, 1), 0.0, 1.0)
    if config.schedule == "linear":
        fall = 1.0 - progress
    elif config.schedule == "cosine":
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    else:
        fall = jnp.ones_like(progress)
    return config.learning_rate * rise * fall


def make_optimizer(config: OptimConfig, total_updates: int) -> optax.GradientTransformation:
    """Global-norm clipping (if on), then AdamW (arXiv:1711.05101).

    The learning rate in use is kept in the optimizer's state, where `learning_rate_in` finds it.
    """
    fixed = {
        "b1": config.b1,
        "b2": config.b2,
        "eps": config.eps,
        "eps_root": 0.0,
        "weight_decay": config.weight_decay,
    }
    adamw = optax.inject_hyperparams(optax.adamw, static_args=tuple(fixed))(
        learning_rate=lambda step: learning_rate_at(config, total_updates, step), **fixed
    )
    if config.max_grad_norm == 0:
        return optax.chain(adamw)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def learning_rate_in(opt_state: optax.OptState) -> Float[Array, ""] | None:
    """The learning rate of the update that made this state; None for an optimizer without one."""
    found = optax.tree.get_all_with_path(
        opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )
    return found[0][1] if found else None

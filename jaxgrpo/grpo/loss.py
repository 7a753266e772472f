"""The GRPO family of losses, as pure functions of log-probs.

Every loss is a weighted sum over tokens, sum(weight * token_losses). The weights come from the
whole step's batch (`token_weights`), so that a sum over micro-batches is the whole, exactly.
Formulas, constants, order of operations and metric names are those of TRL's GRPOTrainer;
`tests/parity/test_trl.py` holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgrpo.config import Correction, GrpoConfig, LossName
from jaxgrpo.types import TrainBatch


def token_weights(
    loss: LossName, loss_mask: Float[Array, "B C"], max_completion_tokens: int
) -> Float[Array, "B C"]:
    """What each token counts for in the step's loss; 0 off the mask.

    grpo, gspo: mean over rows of the mean over a row's tokens. bnpo, dapo, cispo: mean over all
    tokens (they differ only in what TRL averages per micro-batch or process, which is one batch
    here). dr_grpo: sum over tokens by the constant rows x max_completion_tokens
    (arXiv:2503.20783).
    """
    rows = loss_mask.shape[0]
    if loss in ("grpo", "gspo"):
        row_tokens = jnp.sum(loss_mask, axis=1, keepdims=True)
        return loss_mask / (jnp.maximum(row_tokens, 1.0) * rows)
    if loss == "dr_grpo":
        return loss_mask / (rows * max_completion_tokens)
    return loss_mask / jnp.maximum(jnp.sum(loss_mask), 1.0)


def importance_weights(
    correction: Correction,
    cap: float,
    old_logprobs: Float[Array, "B C"],
    sampler_logprobs: Float[Array, "B C"],
    loss_mask: Float[Array, "B C"],
) -> Float[Array, "B K"]:
    """exp(trainer - sampler log-prob), bounded above; no gradient. K is C (token) or 1 (sequence).

    The trainer scores tokens that another program sampled; the ratio corrects for what the two
    disagree on (truncated importance sampling, fengyao.notion.site/off-policy-rl; a sequence's
    ratio is the product over its tokens). Above `cap`: truncate sets the cap, mask drops the term.
    """
    log_ratio = _on_mask(old_logprobs - sampler_logprobs, loss_mask > 0)
    if correction.startswith("sequence"):
        log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    if correction == "none":
        return jnp.ones_like(ratio)
    above = jnp.zeros_like(ratio) if correction.endswith("mask") else jnp.full_like(ratio, cap)
    return jnp.where(ratio > cap, above, ratio)


def token_losses(
    config: GrpoConfig, logprobs: Float[Array, "B C"], batch: TrainBatch
) -> Float[Array, "B C"]:
    """The loss of each token, before weighting: policy term x importance weight + kl_coef x KL.

    Args:
        config: which loss, its clips, its corrections.
        logprobs: the policy's now; the only argument a gradient goes through.
        batch: any set of rows; all that is used is per row, so micro-batches are independent.
    """
    mask = batch.loss_mask > 0
    logprobs = _on_mask(logprobs, mask)
    old_logprobs = _old_logprobs(logprobs, batch)
    ratio = _policy_ratio(config, logprobs, old_logprobs, batch.loss_mask)
    advantages = batch.advantages[:, None]
    if config.loss == "cispo":
        # MiniMax-M1, arXiv:2506.13585: the clipped ratio is a constant weight on log-prob, so no
        # token's gradient is cut off; clip_eps_high is the cap itself.
        capped = jax.lax.stop_gradient(_clamp(ratio, high=clip_high(config)))
        losses = -capped * advantages * logprobs
    else:
        clipped = _clamp(ratio, 1.0 - config.clip_eps_low, 1.0 + clip_high(config))
        unclipped = _clamp(ratio, high=config.delta)
        losses = -jnp.minimum(unclipped * advantages, clipped * advantages)
    if config.importance_correction != "none":
        losses = losses * importance_weights(
            config.importance_correction,
            config.importance_cap,
            old_logprobs,
            batch.sampler_logprobs,
            batch.loss_mask,
        )
    if config.kl_coef > 0:
        # After the importance weight: the pull to the base model is not the sampler's business.
        losses = losses + config.kl_coef * _token_kl(logprobs, batch)
    return jnp.broadcast_to(losses, logprobs.shape)


def clip_high(config: GrpoConfig) -> float:
    """The upper clip, which defaults to the lower one."""
    return config.clip_eps_low if config.clip_eps_high is None else config.clip_eps_high


def loss_metrics(
    config: GrpoConfig,
    logprobs: Float[Array, "B C"],
    entropy: Float[Array, "B C"],
    batch: TrainBatch,
) -> dict[str, Float[Array, ""]]:
    """TRL's metrics of one step, from the whole step's rows (means over tokens do not average).

    Taken over the rows that were computed (`batch.trained`): those that move the policy.
    """
    trained = batch.trained[:, None]
    mask = (batch.loss_mask > 0) & trained
    logprobs = _on_mask(logprobs, mask)
    old_logprobs = _old_logprobs(logprobs, batch)
    metrics = {"entropy": _mean(_on_mask(entropy, mask), mask)}
    if config.kl_coef > 0:
        metrics["kl"] = _mean(_token_kl(logprobs, batch), mask)
    ratio = _policy_ratio(config, logprobs, old_logprobs, batch.loss_mask)
    counted = trained if config.loss == "gspo" else mask
    metrics |= _clip_metrics(config, ratio, batch.advantages[:, None], counted)

    # Against the log-probs at the time of sampling: later inner iterations move the policy, and
    # that is no disagreement between sampler and trainer.
    drift = _on_mask(jnp.abs(old_logprobs - batch.sampler_logprobs), mask)
    metrics["sampling/sampling_logp_difference/mean"] = _mean(drift, mask)
    metrics["sampling/sampling_logp_difference/max"] = jnp.max(drift)
    if config.importance_correction != "none":
        weights = importance_weights(
            config.importance_correction,
            config.importance_cap,
            old_logprobs,
            batch.sampler_logprobs,
            batch.loss_mask,
        )
        per_row = config.importance_correction.startswith("sequence")
        counted = trained if per_row else mask
        name = "sampling/importance_sampling_ratio"
        metrics[f"{name}/min"] = _extreme(jnp.min, weights, counted)
        metrics[f"{name}/mean"] = _mean(weights, counted)
        metrics[f"{name}/max"] = _extreme(jnp.max, weights, counted)
    return metrics


def _clip_metrics(
    config: GrpoConfig,
    ratio: Float[Array, "B K"],
    advantages: Float[Array, "B 1"],
    counted: Bool[Array, "B K"],
) -> dict[str, Float[Array, ""]]:
    """How often the clip bounds the objective: per token, for gspo per row."""
    if config.loss == "cispo":
        capped = (ratio > clip_high(config)) & (advantages > 0)
        return {"cispo_clip_ratio": _mean(capped, counted)}
    ratio = _clamp(ratio, high=config.delta)
    low = (ratio < 1.0 - config.clip_eps_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high(config)) & (advantages > 0)
    row_tokens = jnp.sum(counted, axis=1)
    low_rows, high_rows = (
        jnp.sum(clipped & counted, axis=1) / jnp.maximum(row_tokens, 1) for clipped in (low, high)
    )
    return {
        "clip_ratio/low_mean": _mean(low, counted),
        "clip_ratio/low_min": _extreme(jnp.min, low_rows, row_tokens > 0),
        "clip_ratio/high_mean": _mean(high, counted),
        "clip_ratio/high_max": _extreme(jnp.max, high_rows, row_tokens > 0),
        "clip_ratio/region_mean": _mean(low | high, counted),
    }


def _policy_ratio(
    config: GrpoConfig,
    logprobs: Float[Array, "B C"],
    old_logprobs: Float[Array, "B C"],
    loss_mask: Float[Array, "B C"],
) -> Float[Array, "B K"]:
    """policy / policy at sampling time: per token, or for gspo the geometric mean over the row
    (arXiv:2507.18071, eq. 7), K = 1."""
    log_ratio = logprobs - old_logprobs
    if config.loss == "gspo":
        row_tokens = jnp.maximum(jnp.sum(loss_mask, axis=1, keepdims=True), 1.0)
        log_ratio = jnp.sum(log_ratio * loss_mask, axis=1, keepdims=True) / row_tokens
    return jnp.exp(log_ratio)


def _token_kl(logprobs: Float[Array, "B C"], batch: TrainBatch) -> Float[Array, "B C"]:
    """The k3 estimate of KL(policy || base): unbiased, never negative
    (joschu.net/blog/kl-approx.html)."""
    assert batch.ref_logprobs is not None, "kl_coef > 0 needs ref_logprobs in the batch"
    log_ratio = _on_mask(batch.ref_logprobs, batch.loss_mask > 0) - logprobs
    return jnp.exp(log_ratio) - log_ratio - 1.0


def _old_logprobs(logprobs: Float[Array, "B C"], batch: TrainBatch) -> Float[Array, "B C"]:
    if batch.old_logprobs is None:
        return jax.lax.stop_gradient(logprobs)
    return _on_mask(batch.old_logprobs, batch.loss_mask > 0)


def _on_mask(values: Float[Array, "B C"], mask: Bool[Array, "B C"]) -> Float[Array, "B C"]:
    """0 off the mask: what lies there is garbage, and inf * 0 would be NaN in a gradient."""
    return jnp.where(mask, values, 0.0)


def _clamp(
    values: Float[Array, "B K"], low: float | None = None, high: float | None = None
) -> Float[Array, "B K"]:
    """Clips with gradient 1 at the bounds, where jnp.clip has 1/2: at ratio 1 with a clip of 0
    the whole gradient lies on the bound."""
    if low is not None:
        values = jnp.where(values < low, low, values)
    if high is not None:
        values = jnp.where(values > high, high, values)
    return values


def _mean(values: Array, counted: Bool[Array, "..."]) -> Float[Array, ""]:
    total = jnp.sum(jnp.where(counted, values, 0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)


def _extreme(
    reduce: Callable[[Array], Array], values: Float[Array, "..."], counted: Bool[Array, "..."]
) -> Float[Array, ""]:
    """Minimum or maximum over what counts; 0 when nothing does."""
    fill = jnp.inf if reduce is jnp.min else -jnp.inf
    return jnp.where(jnp.any(counted), reduce(jnp.where(counted, values, fill)), 0.0)

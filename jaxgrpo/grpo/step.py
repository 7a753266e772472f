"""The compiled training step, and the log-probs of the old policy and of the base model.

Micro-batches are scanned inside the step. The scan carries the loss and the gradient; each
micro-batch hands back its log-probs and entropies ([B, C], small), from which the metrics of the
whole step are made afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxgrpo.config import ConfigError, GrpoConfig, Objective
from jaxgrpo.grpo.layer_grad_norms import layer_grad_norms
from jaxgrpo.grpo.loss import loss_metrics, token_losses, token_weights
from jaxgrpo.grpo.optimizer import learning_rate_in
from jaxgrpo.grpo.sensitivity import init_sensitivity, update_sensitivity
from jaxgrpo.mesh import constrain, gpu_options
from jaxgrpo.model.api import (
    Qwen2Config,
    completion_logprobs,
    join_adapters,
    lora_logical_axes,
    remat_of_batch,
)
from jaxgrpo.types import (
    LoraPlan,
    Packing,
    StepMetrics,
    TrainBatch,
    TrainState,
    Tree,
    check_train_batch,
)

TrainStep = Callable[[TrainState, Tree, LoraPlan, TrainBatch], tuple[TrainState, StepMetrics]]


def init_train_state(
    lora: Tree, optimizer: optax.GradientTransformation, track_sensitivity: bool = False
) -> TrainState:
    """The state before the first update; it decides whether AdaLoRA's statistics are kept."""
    return TrainState(
        lora=lora,
        opt_state=optimizer.init(lora),
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        sensitivity=init_sensitivity(lora) if track_sensitivity else None,
    )


def make_train_step(
    model_config: Qwen2Config,
    grpo: GrpoConfig,
    temperature: float,
    max_completion_tokens: int,
    remat: str,
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective = "grpo",
    weight_grad_norms: bool = False,
) -> TrainStep:
    """Jits (state, base, plan, batch) -> (state, metrics); the old state's buffers are reused.

    The plan is an argument, so another plan of the same max_rank runs in the same program. An
    update whose loss or gradient is not finite leaves everything as it was and counts in
    `skipped`. The padding of the adapters (ranks off the plan) never moves, weight decay included.

    Args:
        grpo: the objective and the number of micro-batches.
        temperature: of the sampler; log-probs are taken under it.
        max_completion_tokens: the constant in dr_grpo's normalisation.
        remat: what the backward pass recomputes (`ModelConfig.remat`).
        optimizer: see `make_optimizer`.
        objective: sft takes the completions as gold: mean negative log-likelihood of their tokens.
        weight_grad_norms: also differentiate by the frozen weights, for their norms alone.
    """
    gradients = make_gradients(
        model_config,
        grpo,
        temperature,
        max_completion_tokens,
        remat,
        objective=objective,
        by_kernels=weight_grad_norms,
    )

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=gpu_options())
    def train_step(
        state: TrainState, base: Tree, plan: LoraPlan, batch: TrainBatch
    ) -> tuple[TrainState, StepMetrics]:
        loss, grads, kernel_grads, logprobs, entropy = gradients(state.lora, base, plan, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
        updates = mask_padding(cast(Tree, updates), plan)
        moved = TrainState(
            lora=cast(Tree, optax.apply_updates(state.lora, updates)),
            opt_state=opt_state,
            step=state.step + 1,
            skipped=state.skipped,
            sensitivity=None
            if state.sensitivity is None
            else update_sensitivity(state.sensitivity, state.lora, grads),
        )
        stayed = dataclasses.replace(state, skipped=state.skipped + 1)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, stayed)

        scalars = {"loss": loss, "grad_norm": grad_norm}
        if objective == "grpo":
            scalars |= loss_metrics(grpo, logprobs, entropy, batch)
        scalars["grpo/skipped_updates"] = after.skipped.astype(jnp.float32)
        learning_rate = learning_rate_in(opt_state)
        if learning_rate is not None:
            scalars["learning_rate"] = learning_rate
        norms = layer_grad_norms(grads, plan, kernel_grads)
        return after, StepMetrics(scalars=scalars, layer_grad_norms=norms)

    return train_step


def make_gradients(
    model_config: Qwen2Config,
    grpo: GrpoConfig,
    temperature: float,
    max_completion_tokens: int,
    remat: str,
    *,
    objective: Objective,
    by_kernels: bool,
) -> Callable[..., tuple[Array, Tree, Tree | None, Array, Array]]:
    """(lora, base, plan, batch) -> loss, gradient by lora, by the kernels, log-probs, entropies.

    The gradient by the kernels is float32 [L, in, out] per adapted module, or None.
    """
    _check_temperature(temperature)

    def loss_of(
        point: tuple[Tree, Tree | None],
        base: Tree,
        plan: LoraPlan,
        rows: TrainBatch,
        weights: Float[Array, "B C"],
        *,
        joined: Tree | None,
        remat: str,
    ) -> tuple[Float[Array, ""], tuple[Float[Array, "B C"], Float[Array, "B C"]]]:
        lora, kernels = point
        if kernels is not None:
            layers = {
                name: {**leaves, "kernel": kernels[name]} if name in kernels else leaves
                for name, leaves in base["layers"].items()
            }
            base = {**base, "layers": layers}
        logprobs, entropy = completion_logprobs(
            model_config,
            base,
            lora,
            plan,
            rows.tokens,
            rows.prompt_lengths,
            rows.completion_tokens,
            temperature=temperature,
            chunk_tokens=grpo.logprob_chunk_tokens,
            remat=remat,
            packing=rows.packing,
            joined=joined,
        )
        per_token = (
            token_losses(grpo, logprobs, rows)
            if objective == "grpo"
            else -jnp.where(rows.loss_mask > 0, logprobs, 0.0)
        )
        return jnp.sum(weights * per_token), (logprobs, entropy)

    def gradients(
        lora: Tree, base: Tree, plan: LoraPlan, batch: TrainBatch
    ) -> tuple[Array, Tree, Tree | None, Array, Array]:
        check_train_batch(batch)
        kernels = {m: base["layers"][m]["kernel"] for m in lora} if by_kernels else None
        # dapo's weights are the mean over all tokens, which is also the supervised loss.
        kind = grpo.loss if objective == "grpo" else "dapo"
        weights = token_weights(kind, batch.loss_mask, max_completion_tokens)
        parts = grpo.micro_batches
        policy = remat_of_batch(
            model_config, remat, batch.tokens, batch.packing, parts, grpo.logprob_chunk_tokens
        )
        joined = join_adapters(base, lora, plan, policy)
        loss, (grads, kernel_grads), scored = _accumulate(
            lambda point, part: loss_of(point, base, plan, *part, joined=joined, remat=policy),
            (lora, kernels),
            split_rows((batch, weights), parts),
        )
        return loss, grads, kernel_grads, *join_rows(scored)

    return gradients


Point = tuple[Tree, Tree | None]
"""What is differentiated by: the adapters and, or None, the frozen kernels."""


def _accumulate(
    loss_of: Callable[[Point, Any], tuple[Float[Array, ""], Any]], point: Point, parts: Any
) -> tuple[Float[Array, ""], Point, Any]:
    """Sums loss and gradient over the leading axis of `parts`; stacks what else `loss_of` gives."""

    def add(total: tuple[Array, Point], part: Any) -> tuple[tuple[Array, Point], Any]:
        (loss, scored), grads = jax.value_and_grad(loss_of, has_aux=True)(point, part)
        loss, (grads, kernel_grads) = jax.tree.map(jnp.add, total, (loss, grads))
        return (loss, (_place_like_lora(grads), kernel_grads)), scored

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), point)
    (loss, grads), scored = jax.lax.scan(add, (jnp.zeros((), jnp.float32), zero), parts)
    return loss, grads, scored


def make_logprobs(
    model_config: Qwen2Config, temperature: float, chunk_tokens: int, remat: str, micro_batches: int
) -> Callable[..., Float[Array, "B C"]]:
    """Jits (base, lora, plan, tokens, prompt_lengths, completion_tokens[, packing]) -> log-probs.

    With the policy's lora and plan it gives `old_logprobs`; with lora=None and plan=None the
    adapters are off and the same weights give `ref_logprobs`.
    """
    _check_temperature(temperature)

    @functools.partial(jax.jit, compiler_options=gpu_options())
    def logprobs(
        base: Tree,
        lora: Tree | None,
        plan: LoraPlan | None,
        tokens: Int[Array, "B T"],
        prompt_lengths: Int[Array, " B"],
        completion_tokens: Int[Array, "B C"],
        packing: Packing | None = None,
    ) -> Float[Array, "B C"]:
        joined = None
        if lora is not None and plan is not None:
            joined = join_adapters(base, lora, plan, remat)

        def score(part: tuple) -> Float[Array, "B C"]:
            *rows, packing = part
            return completion_logprobs(
                model_config,
                base,
                lora,
                plan,
                *rows,
                temperature=temperature,
                chunk_tokens=chunk_tokens,
                remat=remat,
                packing=packing,
                joined=joined,
            )[0]

        rows = (tokens, prompt_lengths, completion_tokens, packing)
        parts = split_rows(rows, micro_batches)
        return join_rows(jax.lax.map(score, parts))

    return logprobs


def split_rows(tree: Any, micro_batches: int) -> Any:
    """[B, ...] -> [M, B/M, ...]; micro-batch m takes the rows m, m+M, m+2M, ...

    Striding and not cutting: rows are sharded in contiguous blocks, so every micro-batch keeps an
    equal part on every device and nothing moves between devices.
    """

    def split(leaf: Array) -> Array:
        rows = leaf.shape[0]
        assert rows % micro_batches == 0, (rows, micro_batches)
        return jnp.moveaxis(
            leaf.reshape(rows // micro_batches, micro_batches, *leaf.shape[1:]), 1, 0
        )

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), tree)


def mask_padding(updates: Tree, plan: LoraPlan) -> Tree:
    """0 on the ranks that the plan does not use."""
    return {
        module: {
            "a": matrices["a"] * plan.masks[module][:, None, :],
            "b": matrices["b"] * plan.masks[module][:, :, None],
        }
        for module, matrices in updates.items()
    }


def _place_like_lora(tree: Tree) -> Tree:
    """Keeps gradients where the adapters are, and with them the new state: a state that came back
    placed differently would neither reuse the old one's buffers nor run without recompiling."""
    axes = lora_logical_axes(tuple(tree))
    return {
        module: {side: constrain(leaf, *axes[module][side]) for side, leaf in matrices.items()}
        for module, matrices in tree.items()
    }


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ConfigError(
            f"rollout.temperature must be positive to train, got {temperature}: greedy completions "
            "of one prompt are all the same"
        )

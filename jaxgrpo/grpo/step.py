"""The compiled training step.

A step runs as many bins of tokens as its rows fill, one after another inside the program. The loop
carries the loss, the gradient, and log-probs and entropies by row ([B, C], small), from which the
metrics of the whole step are made afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxgrpo.config import Config, GrpoConfig, Objective
from jaxgrpo.grpo.layer_grad_norms import layer_grad_norms
from jaxgrpo.grpo.logprobs import check_temperature
from jaxgrpo.grpo.loss import loss_metrics, token_losses, token_weights
from jaxgrpo.grpo.optimizer import Schedule, learning_rate_in
from jaxgrpo.grpo.sensitivity import init_sensitivity, update_sensitivity
from jaxgrpo.mesh import constrain, on_own_arms, over_row_shards
from jaxgrpo.model.api import (
    QwenConfig,
    bin_logprobs,
    join_adapters,
    lora_logical_axes,
    remat_of_batch,
)
from jaxgrpo.model.bins import (
    completions_from_bins,
    holds_row,
    over_bins,
    put_rows,
    rows_of_bin,
    take_bin,
)
from jaxgrpo.types import (
    Adapters,
    LoraPlan,
    Packing,
    StepMetrics,
    TrainBatch,
    TrainState,
    Tree,
    check_train_batch,
    unstack_arms,
)


@dataclass(frozen=True)
class StepSettings:
    """What a train step is compiled for, besides the model.

    Attributes:
        grpo: the objective.
        temperature: of the sampler; log-probs are taken under it.
        max_completion_tokens: the constant in dr_grpo's normalisation.
        remat: what the backward pass recomputes (`ModelConfig.remat`).
        objective: sft takes the completions as gold: mean negative log-likelihood of their tokens.
        weight_grad_norms: also differentiate by the frozen weights, for their norms alone.
    """

    grpo: GrpoConfig
    temperature: float
    max_completion_tokens: int
    remat: str
    objective: Objective = "grpo"
    weight_grad_norms: bool = False

    @classmethod
    def of(cls, config: Config) -> StepSettings:
        """A run's."""
        return cls(
            grpo=config.grpo,
            temperature=config.rollout.temperature,
            max_completion_tokens=config.rollout.max_completion_tokens,
            remat=config.model.remat,
            objective=config.objective,
            weight_grad_norms=config.weight_grad_norms,
        )


TrainStep = Callable[..., tuple[TrainState, StepMetrics]]


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


Update = Callable[..., tuple[TrainState, StepMetrics]]
"""(base, state, plan, batch, schedule) -> what one arm's update leaves."""


def make_train_step(
    model_config: QwenConfig, settings: StepSettings, optimizer: optax.GradientTransformation
) -> TrainStep:
    """Jits (state, base, plan, batch, schedule) -> (state, metrics); the old state's buffers are
    reused.

    Plan and schedule are arguments: another plan of the same max_rank, another learning rate and
    another number of steps run in the same program. An update whose loss or gradient is not finite
    leaves everything as it was and counts in `skipped`. The padding of the adapters (ranks off the
    plan) never moves, weight decay included.

    In tuples, all of them but the base are those of several arms, each of which is updated as if
    it were alone: on a device of its own where they are spread over the mesh (`on_own_arms`).
    """
    check_temperature(settings.temperature)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=model_config.device.options)
    def train_step(state: Any, base: Tree, plan: Any, batch: Any, schedule: Any) -> tuple[Any, Any]:
        arms = len(state) if isinstance(state, tuple) else 1
        update = make_update(model_config.of_arms(arms), settings, optimizer)
        if not isinstance(state, tuple):
            return update(base, state, plan, batch, schedule)

        def update_all(base: Tree, stacked: tuple) -> tuple[TrainState, StepMetrics]:
            # One after the other: the rows of one fill the device.
            return jax.lax.map(lambda arm: update(base, *arm), stacked)

        run = on_own_arms(update_all, model_config.device)
        states, metrics = run(base, (state, plan, batch, schedule))
        return tuple(map(_place_state, unstack_arms(states, arms))), metrics

    return train_step


def make_update(
    model_config: QwenConfig, settings: StepSettings, optimizer: optax.GradientTransformation
) -> Update:
    """One arm's update, not compiled; see `make_train_step`."""
    gradients = make_gradients(model_config, settings)
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        base: Tree,
        state: TrainState,
        plan: LoraPlan,
        batch: TrainBatch,
        schedule: Schedule,
    ) -> tuple[TrainState, StepMetrics]:
        adapters = Adapters(state.lora, plan)
        loss, grads, kernel_grads, logprobs, entropy = gradients(base, adapters, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora, schedule=schedule)
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
        if settings.objective == "grpo":
            scalars |= loss_metrics(settings.grpo, logprobs, entropy, batch)
            scalars["grpo/frac_rows_trained"] = jnp.mean(batch.trained, dtype=jnp.float32)
        scalars |= packing_metrics(batch.packing)
        scalars["grpo/skipped_updates"] = after.skipped.astype(jnp.float32)
        own_rate = learning_rate_in(opt_state)
        if own_rate is not None:
            scalars["learning_rate"] = own_rate
        norms = layer_grad_norms(grads, plan, kernel_grads)
        return after, StepMetrics(scalars=scalars, layer_grad_norms=norms)

    return update


def make_gradients(
    model_config: QwenConfig, settings: StepSettings
) -> Callable[..., tuple[Array, Tree, Tree | None, Array, Array]]:
    """(base, adapters, batch) -> loss, gradient by lora, by the kernels, log-probs, entropies.

    The gradient by the kernels is float32 [L, in, out] per adapted module, or None.
    """
    check_temperature(settings.temperature)
    grpo, supervised = settings.grpo, settings.objective == "sft"
    config = model_config.of_rows

    def loss_of(
        point: Point,
        base: Tree,
        adapters: Adapters,
        rows: TrainBatch,
        weights: Float[Array, "WR C"],
        remat: str,
    ) -> tuple[Float[Array, ""], tuple[Float[Array, "WR C"], Float[Array, "WR C"]]]:
        lora, kernels = point
        if kernels is not None:
            layers = {
                name: {**leaves, "kernel": kernels[name]} if name in kernels else leaves
                for name, leaves in base["layers"].items()
            }
            base = {**base, "layers": layers}
        found = bin_logprobs(
            config,
            base,
            dataclasses.replace(adapters, lora=lora),
            rows.packing,
            temperature=settings.temperature,
            chunk_tokens=grpo.logprob_chunk_tokens,
            remat=remat,
        )
        width = weights.shape[1]
        logprobs, entropy = (completions_from_bins(x, rows.packing, width) for x in found)
        per_token = (
            -jnp.where(rows.loss_mask > 0, logprobs, 0.0)
            if supervised
            else token_losses(grpo, logprobs, rows)
        )
        return jnp.sum(weights * per_token), (logprobs, entropy)

    def of_rows(
        whole: tuple[Tree, Adapters], split: tuple[TrainBatch, Float[Array, "B C"]]
    ) -> tuple[tuple[Array, Point], tuple[Array, Array]]:
        (base, adapters), (batch, weights) = whole, split
        lora, kernels = adapters.lora, None
        if settings.weight_grad_norms:
            kernels = {module: base["layers"][module]["kernel"] for module in lora}
        remat = remat_of_batch(config, settings.remat, batch.packing, grpo.logprob_chunk_tokens)
        joined = join_adapters(config, base, adapters, remat)

        def loss_of_bin(point: Point, number: Array) -> tuple[Array, tuple[Packing, Any]]:
            rows, weighted = batch_of_bin(batch, weights, number)
            loss, scored = loss_of(point, base, joined, rows, weighted, remat)
            return loss, (rows.packing, scored)

        return _accumulate(loss_of_bin, (lora, kernels), batch)

    run = over_row_shards(of_rows, model_config.device)

    def gradients(
        base: Tree, adapters: Adapters, batch: TrainBatch
    ) -> tuple[Array, Tree, Tree | None, Array, Array]:
        check_train_batch(batch)
        # dapo's weights are the mean over all tokens, which is also the supervised loss.
        kind = "dapo" if supervised else grpo.loss
        weights = token_weights(kind, batch.loss_mask, settings.max_completion_tokens)
        (loss, (grads, kernel_grads)), (logprobs, entropy) = run((base, adapters), (batch, weights))
        return loss, grads, kernel_grads, logprobs, entropy

    return gradients


def packing_metrics(packing: Packing) -> dict[str, Float[Array, ""]]:
    """How many bins each shard ran, and the share of their places that held no token."""
    shards, _, places = packing.tokens.shape
    computed = jnp.maximum(packing.count, 1) * (shards * places)
    filled = jnp.sum(packing.row >= 0, dtype=jnp.int32)
    padding = jnp.where(packing.count > 0, 1.0 - filled / computed, 0.0)
    return {"packing/bins": packing.count.astype(jnp.float32), "packing/padding": padding}


def batch_of_bin(
    batch: TrainBatch, weights: Float[Array, "B C"], number: Int[Array, ""]
) -> tuple[TrainBatch, Float[Array, "WR C"]]:
    """The rows of one bin of each shard, and their tokens' weights: 0 where there is no row."""
    packing = take_bin(batch.packing, number)
    by_row = dataclasses.replace(batch, packing=None)  # type: ignore[arg-type]
    rows, weights = rows_of_bin((by_row, weights), packing)
    there = holds_row(packing)[:, None]
    rows = dataclasses.replace(
        rows, packing=packing, loss_mask=jnp.where(there, rows.loss_mask, 0.0)
    )
    return rows, jnp.where(there, weights, 0.0)


Point = tuple[Tree, Tree | None]
"""What is differentiated by: the adapters and, or None, the frozen kernels."""


def _accumulate(
    loss_of: Callable[[Point, Array], tuple[Float[Array, ""], tuple[Packing, Any]]],
    point: Point,
    batch: TrainBatch,
) -> tuple[tuple[Float[Array, ""], Point], tuple[Float[Array, "B C"], Float[Array, "B C"]]]:
    """Sums loss and gradient over the bins in use; log-probs and entropies go to their rows.
    One program for any number of bins: nothing differentiates through the loop."""

    def add(number: Array, total: tuple) -> tuple:
        (loss, grads), scored = total
        (more, (packing, found)), by_point = jax.value_and_grad(loss_of, has_aux=True)(
            point, number
        )
        loss, (grads, kernel_grads) = jax.tree.map(jnp.add, (loss, grads), (more, by_point))
        scored = jax.tree.map(lambda into, rows: put_rows(into, rows, packing), scored, found)
        return (loss, (_place_like_lora(grads), kernel_grads)), scored

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), point)
    nothing = jnp.zeros_like(batch.loss_mask)
    start = ((jnp.zeros((), jnp.float32), zero), (nothing, nothing))
    return over_bins(batch.packing, add, start)


def mask_padding(updates: Tree, plan: LoraPlan) -> Tree:
    """0 on the ranks that the plan does not use."""
    return {
        module: {
            "a": matrices["a"] * plan.masks[module][:, None, :],
            "b": matrices["b"] * plan.masks[module][:, :, None],
        }
        for module, matrices in updates.items()
    }


def _place_state(state: TrainState) -> TrainState:
    """Keeps an arm's state where it was, once it is out of the loop over the arms."""

    def like_lora(tree: Any) -> bool:
        return isinstance(tree, dict) and jax.tree.structure(tree) == form

    form = jax.tree.structure(state.lora)
    return jax.tree.map(
        lambda x: _place_like_lora(x) if like_lora(x) else x, state, is_leaf=like_lora
    )


def _place_like_lora(tree: Tree) -> Tree:
    """Keeps gradients where the adapters are, and with them the new state: a state that came back
    placed differently would neither reuse the old one's buffers nor run without recompiling."""
    axes = lora_logical_axes(tuple(tree))
    return {
        module: {side: constrain(leaf, *axes[module][side]) for side, leaf in matrices.items()}
        for module, matrices in tree.items()
    }

"""The log-probs of the old policy and of the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrpo.config import ConfigError
from jaxgrpo.mesh import on_own_arms, over_row_shards
from jaxgrpo.model.api import QwenConfig, bin_logprobs, join_adapters
from jaxgrpo.model.bins import completions_from_bins, over_bins, put_rows, take_bin
from jaxgrpo.types import Adapters, TrainBatch, Tree, unstack_arms


def make_logprobs(
    model_config: QwenConfig, temperature: float, chunk_tokens: int, remat: str
) -> Callable[..., Float[Array, "B C"]]:
    """Jits (base, adapters, batch) -> log-probs of the rows that are computed, 0 elsewhere; in
    tuples, adapters and batch are those of several arms.

    With the policy's adapters it gives `old_logprobs`; with those of what training starts from,
    None as a rule, the same weights give `ref_logprobs`.
    """
    check_temperature(temperature)

    def of_rows(
        config: QwenConfig, base: Tree, adapters: Adapters | None, batch: TrainBatch
    ) -> Float[Array, "B C"]:
        if adapters is not None:
            adapters = join_adapters(config, base, adapters, remat)
        width = batch.loss_mask.shape[1]

        def score(number: Array, into: Array) -> Array:
            packing = take_bin(batch.packing, number)
            found, _ = bin_logprobs(
                config,
                base,
                adapters,
                packing,
                temperature=temperature,
                chunk_tokens=chunk_tokens,
                remat=remat,
            )
            return put_rows(into, completions_from_bins(found, packing, width), packing)

        return over_bins(batch.packing, score, jnp.zeros_like(batch.loss_mask))

    def of_arm(
        config: QwenConfig, base: Tree, adapters: Adapters | None, batch: TrainBatch
    ) -> Float[Array, "B C"]:
        def found(whole: tuple[Tree, Adapters | None], batch: TrainBatch) -> tuple[tuple, Array]:
            return (), of_rows(config.of_rows, *whole, batch)

        return over_row_shards(found, config.device)((base, adapters), batch)[1]

    @functools.partial(jax.jit, compiler_options=model_config.device.options)
    def logprobs(
        base: Tree, adapters: Any, batch: Any
    ) -> Float[Array, "B C"] | tuple[Float[Array, "B C"], ...]:
        if not isinstance(batch, tuple):
            return of_arm(model_config, base, adapters, batch)
        config = model_config.of_arms(len(batch))

        def of_all(base: Tree, stacked: tuple) -> Float[Array, "A B C"]:
            return jax.lax.map(lambda arm: of_arm(config, base, *arm), stacked)

        found = on_own_arms(of_all, model_config.device)(base, (adapters, batch))
        return unstack_arms(found, len(batch))

    return logprobs


def check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ConfigError(
            f"rollout.temperature must be positive to train, got {temperature}: greedy completions "
            "of one prompt are all the same"
        )

"""Sampling: one prefill per prompt, one compiled loop for all completions.

Prompts are run once and their caches shared by the group. The loop stops when every row has ended
or the cap is reached. Weights are an argument in the decode form (`model.api.make_decode_weights`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.config import RolloutConfig
from jaxgrpo.mesh import constrain, decode_options
from jaxgrpo.model.api import (
    Qwen2Config,
    cache_slots,
    decode_step,
    init_completion_cache,
    logits,
    prefill,
)
from jaxgrpo.rollout.sampling import draws_needed, row_draws, row_keys, sample
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.types import FINISH_LENGTH, FINISH_STOP_STRING, FINISH_STOP_TOKEN, Rollout, Tree

Generate = Callable[[Tree, jax.Array, jax.Array, jax.Array], Rollout]


class _Loop(NamedTuple):
    """What the decode loop carries; `t` tokens of every row have been sampled."""

    t: Int[Array, ""]
    hidden: Float[Array, "B D"]
    cache: tuple
    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]
    lengths: Int[Array, " B"]
    finish_reasons: Int[Array, " B"]
    done: Bool[Array, " B"]
    stop_state: Int[Array, " B"]


def make_generate(
    model_config: Qwen2Config, rollout: RolloutConfig, stop: StopRules, group_size: int
) -> Generate:
    """Jits (weights, prompt_tokens [P, S], prompt_mask [P, S], key) -> Rollout of P*G rows.

    Args:
        rollout: cap, temperature and cuts; static, so that what is off costs nothing.
        stop: what ends a completion.
        group_size: completions per prompt, row p*G+g being completion g of prompt p.
    """
    width = rollout.max_completion_tokens
    stop_ids = jnp.asarray(stop.token_ids, jnp.int32)
    transitions = None if stop.transitions is None else jnp.asarray(stop.transitions)

    count = draws_needed(rollout.top_p)

    def draw(
        weights: Tree, keys: jax.Array, draws: jax.Array, loop: _Loop
    ) -> tuple[jax.Array, _Loop]:
        """Samples token `t` of every row from `hidden` and books it."""
        scores = constrain(logits(model_config, weights, loop.hidden), "act_batch", "act_vocab")
        tokens, logprobs = sample(
            scores,
            draws[loop.t],
            lambda number: row_draws(keys, (number * width + loop.t)[None], count)[0],
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
        )
        live = ~loop.done
        tokens = jnp.where(live, tokens, 0)
        by_token = live & jnp.any(tokens[:, None] == stop_ids[None, :], axis=1)
        by_string = jnp.zeros_like(by_token)
        stop_state = loop.stop_state
        if transitions is not None:
            stop_state = jnp.where(live, transitions[stop_state, tokens], stop_state)
            by_string = live & (stop_state == transitions.shape[0] - 1) & ~by_token
        reason = jnp.where(by_token, FINISH_STOP_TOKEN, loop.finish_reasons)
        reason = jnp.where(by_string, FINISH_STOP_STRING, reason)
        column = (jnp.arange(width) == loop.t)[None, :]
        return tokens, loop._replace(
            tokens=jnp.where(column, tokens[:, None], loop.tokens),
            logprobs=jnp.where(column & live[:, None], logprobs[:, None], loop.logprobs),
            lengths=loop.lengths + live,
            finish_reasons=reason,
            done=loop.done | by_token | by_string,
            stop_state=stop_state,
        )

    @functools.partial(jax.jit, compiler_options=decode_options())
    def generate(
        weights: Tree,
        prompt_tokens: Int[Array, "P S"],
        prompt_mask: Bool[Array, "P S"],
        key: jax.Array,
    ) -> Rollout:
        rows = prompt_tokens.shape[0] * group_size
        keys = row_keys(key, rows)
        draws = row_draws(keys, jnp.arange(width), count)
        slots = cache_slots(prompt_tokens.shape[1], model_config.compute_dtype)
        unused = slots - prompt_tokens.shape[1]
        prompt_tokens = jnp.pad(prompt_tokens, ((0, 0), (unused, 0)))
        prompt_mask = jnp.pad(prompt_mask, ((0, 0), (unused, 0)))
        hidden, prompt_cache = prefill(model_config, weights, prompt_tokens, prompt_mask)
        start = _Loop(
            t=jnp.zeros((), jnp.int32),
            hidden=constrain(jnp.repeat(hidden, group_size, axis=0), "act_batch", "act_embed"),
            cache=init_completion_cache(model_config, rows, width),
            tokens=jnp.zeros((rows, width), jnp.int32),
            logprobs=jnp.zeros((rows, width), jnp.float32),
            lengths=jnp.zeros(rows, jnp.int32),
            finish_reasons=jnp.full(rows, FINISH_LENGTH, jnp.int32),
            done=jnp.zeros(rows, bool),
            stop_state=jnp.zeros(rows, jnp.int32),
        )

        def body(loop: _Loop) -> _Loop:
            tokens, loop = draw(weights, keys, draws, loop)
            hidden, cache = decode_step(
                model_config, weights, prompt_cache, prompt_mask, loop.cache, tokens, loop.t
            )
            return loop._replace(t=loop.t + 1, hidden=hidden, cache=cache)

        def unfinished(loop: _Loop) -> Bool[Array, ""]:
            # The last token needs no decode step after it, so it is drawn after the loop.
            return (loop.t < width - 1) & ~jnp.all(loop.done)

        loop = jax.lax.while_loop(unfinished, body, start)
        _, loop = draw(weights, keys, draws, loop)
        mask = jnp.arange(width)[None, :] < loop.lengths[:, None]
        return Rollout(
            tokens=loop.tokens,
            mask=mask,
            logprobs=loop.logprobs,
            lengths=loop.lengths,
            finish_reasons=loop.finish_reasons,
        )

    return generate

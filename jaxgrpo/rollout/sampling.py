"""From logits to a token and its log-prob.

The log-prob is of softmax(logits / temperature) over the whole vocabulary, whatever top-k, top-p
and min-p cut away: it is what the trainer computes again. The cuts follow transformers' order
(temperature, top-k, top-p, min-p) and keep the same sets.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgrpo.config import RolloutConfig
from jaxgrpo.devices import ONE_CPU, Device
from jaxgrpo.model.block_statistics import BLOCK, block_statistics, block_sums

CANDIDATES = 4
"""Draws of a round of `draw_nucleus`: at top_p 0.95 one row in 160,000 needs a second round."""


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """One key per row, so that a row's draws depend on its number alone, not on the batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def row_draws(keys: Array, tokens: Int[Array, " t"], count: int = 1) -> Float[Array, "t B k"]:
    """`count` uniform numbers per row and token: those of row b at token t come from
    fold_in(keys[b], t). Made before the loop, where they are one small program instead of ten."""

    def draws_at(t: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t), (count,)))(keys)

    return jax.lax.map(draws_at, tokens)


def draws_needed(top_p: float) -> int:
    """Uniform numbers that `sample` wants per row and token."""
    return CANDIDATES if top_p < 1 else 1


def sample(
    logits: Float[Array, "B V"],
    draws: Float[Array, "B k"],
    more: Callable[[jax.Array], jax.Array],
    rollout: RolloutConfig,
    device: Device = ONE_CPU,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token per row and gives its log-prob, float32.

    Args:
        draws: uniform in [0, 1), `draws_needed` of them a row.
        more: round (1, 2, ...) -> as many again, for the rare row that top-p needs them for.
        rollout: temperature and cuts. Temperature 0 takes the likeliest token, and its log-prob at
            temperature 1.
    """
    temperature, top_p = rollout.temperature, rollout.top_p
    logits = logits.astype(jnp.float32)
    scores = logits / temperature if temperature > 0 else logits
    top, sums = block_statistics(logits, temperature if temperature > 0 else 1.0, device)
    norm = top + jnp.log(jnp.sum(sums, axis=-1))
    if temperature == 0:
        tokens = jnp.argmax(scores, axis=-1)
    elif rollout.top_k > 0 or rollout.min_p > 0:
        kept = keep(scores, top_k=rollout.top_k, top_p=top_p, min_p=rollout.min_p)
        tokens = inverse_cdf(kept, top, block_sums(kept, top), draws[:, 0])
    elif top_p < 1:
        tokens = draw_nucleus(scores, top, sums, draws, more, top_p)
    else:
        tokens = inverse_cdf(scores, top, sums, draws[:, 0])
    picked = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), picked - norm


def draw_nucleus(
    scores: Float[Array, "B V"],
    top: Float[Array, " B"],
    sums: Float[Array, "B n"],
    draws: Float[Array, "B k"],
    more: Callable[[jax.Array], jax.Array],
    top_p: float,
) -> Int[Array, " B"]:
    """One token of each row's nucleus by rejection, exactly, without sorting the vocabulary.

    A candidate drawn from the whole distribution belongs to the nucleus if the tokens likelier
    than it hold less than `top_p`; the first that does is a draw from the nucleus. One pass judges
    all candidates. A rejected one bounds the nucleus from below, so later rounds draw above it and
    end after a few whatever top_p is (Ye et al. 2025, flashinfer.ai/2025/03/10/sampling.html).
    """
    rows, count = draws.shape
    enough = top_p * jnp.sum(sums, axis=-1)

    def attempt(floor: jax.Array, sums: jax.Array, draws: jax.Array) -> tuple:
        allowed = jnp.where(scores > floor[:, None], scores, -jnp.inf)
        tokens = [inverse_cdf(allowed, top, sums, draws[:, i]) for i in range(count)]
        tokens = jnp.stack(tokens, axis=1)
        reached = jnp.take_along_axis(scores, tokens, axis=1)
        weights = jnp.exp(scores - top[:, None])
        likelier = [
            jnp.sum(jnp.where(scores > reached[:, i, None], weights, 0.0), axis=-1)
            for i in range(count)
        ]
        inside = jnp.stack(likelier, axis=1) < enough[:, None]
        floor = jnp.maximum(floor, jnp.max(jnp.where(inside, -jnp.inf, reached), axis=1))
        first = jnp.argmax(inside, axis=1)
        return jnp.take_along_axis(tokens, first[:, None], axis=1)[:, 0], inside.any(axis=1), floor

    def again(state: tuple) -> tuple:
        number, tokens, found, floor = state
        left = block_sums(jnp.where(scores > floor[:, None], scores, -jnp.inf), top)
        fresh, now, floor = attempt(floor, left, more(number))
        return number + 1, jnp.where(found, tokens, fresh), found | now, floor

    tokens, found, floor = attempt(jnp.full((rows,), -jnp.inf), sums, draws)
    state = (jnp.int32(1), tokens, found, floor)
    return jax.lax.while_loop(lambda state: ~jnp.all(state[2]), again, state)[1]


def keep(
    scores: Float[Array, "B V"], *, top_k: int, top_p: float, min_p: float
) -> Float[Array, "B V"]:
    """Scores with what the cuts remove at -inf; static arguments, so cuts that are off cost 0."""
    if top_k > 0:
        threshold = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < threshold, -jnp.inf, scores)
    if top_p < 1:
        # Ascending, as transformers does it: drop the tail that holds at most 1 - top_p, never all.
        order = jnp.argsort(scores, axis=-1, stable=True)
        ascending = jnp.take_along_axis(scores, order, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        drop = (below <= 1 - top_p).at[:, -1].set(False)
        ranks = jnp.argsort(order, axis=-1)
        scores = jnp.where(jnp.take_along_axis(drop, ranks, axis=-1), -jnp.inf, scores)
    if min_p > 0:
        threshold = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(min_p)
        scores = jnp.where(scores < threshold, -jnp.inf, scores)
    return scores


def inverse_cdf(
    scores: Float[Array, "B V"],
    top: Float[Array, " B"],
    sums: Float[Array, "B n"],
    draws: Float[Array, " B"],
) -> Int[Array, " B"]:
    """The token at quantile `draws` of softmax(scores): one uniform a row, no sort.

    Two levels, so that only one block of the vocabulary is ever summed element by element, and
    float32 sums stay short: first the block in which the quantile falls, then the place in it.

    Args:
        top, sums: a row's largest score, and `block_sums` of the same scores.
    """
    target = draws * jnp.sum(sums, axis=-1)
    block, before = _search(sums, target)
    places = block[:, None] * BLOCK + jnp.arange(BLOCK)[None, :]
    inside = jnp.take_along_axis(scores, jnp.minimum(places, scores.shape[1] - 1), axis=1)
    weights = jnp.where(places < scores.shape[1], jnp.exp(inside - top[:, None]), 0.0)
    place, _ = _search(weights, target - before)
    return block * BLOCK + place


def _search(
    weights: Float[Array, "B n"], target: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first place whose running sum exceeds `target`, and the sum before it.

    Rounding can push `target` past the total, or onto the edge of an empty place; the answer is
    always a place with positive weight.
    """
    sums = jnp.cumsum(weights, axis=-1)
    places = jnp.arange(weights.shape[-1])[None, :]
    candidates = (sums > target[:, None]) & (weights > 0)
    last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
    place = jnp.where(jnp.any(candidates, axis=-1), jnp.argmax(candidates, axis=-1), last)
    total = jnp.take_along_axis(sums, place[:, None], axis=-1)[:, 0]
    return place, total - jnp.take_along_axis(weights, place[:, None], axis=-1)[:, 0]

"""Log-probs and entropies of given tokens, without [B, T, V] and without making logits twice.

The head is frozen, so all that a backward pass wants from it is d logprob / d hidden, and that is
known as soon as the logits are: (W[target] - softmax(logits) @ W) / temperature. It is made with
them, chunk by chunk, and kept ([B, C, D]); the backward pass is one product by the cotangent.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgrpo.devices import Device
from jaxgrpo.mesh import constrain
from jaxgrpo.model.block_statistics import row_statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_logprobs(
    table: Float[Array, "V D"],
    hidden: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
    temperature: float,
    chunk_tokens: int,
    device: Device,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Log-prob of `targets` and entropy under softmax(hidden @ table.T / temperature), float32.

    The table gets no gradient, the entropy passes none on. Logits exist for about `chunk_tokens`
    tokens at a time.
    """

    def chunk(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _statistics(table, *xs, temperature, device)[0]

    return _by_chunks(chunk, (hidden, targets), chunk_tokens)


def _forward(
    table: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: float,
    chunk_tokens: int,
    device: Device,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    def chunk(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        (logprobs, entropy), probabilities = _statistics(table, *xs, temperature, device)
        mean = jnp.einsum(
            "bcv,vd->bcd",
            probabilities.astype(table.dtype),
            table,
            preferred_element_type=jnp.float32,
        )
        slope = (table[xs[1]].astype(jnp.float32) - mean) / temperature
        return logprobs, entropy, slope.astype(hidden.dtype)

    logprobs, entropy, slopes = _by_chunks(chunk, (hidden, targets), chunk_tokens)
    return (logprobs, entropy), slopes


def _backward(
    temperature: float, chunk_tokens: int, device: Device, slopes: jax.Array, cotangents: tuple
) -> tuple[None, jax.Array, None]:
    d_logprobs, _ = cotangents
    return None, (d_logprobs[..., None] * slopes).astype(slopes.dtype), None


token_logprobs.defvjp(_forward, _backward)


def _statistics(
    table: jax.Array, hidden: jax.Array, targets: jax.Array, temperature: float, device: Device
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """((log-probs, entropy), probabilities) of one chunk."""
    scores = jnp.einsum("bcd,vd->bcv", hidden, table, preferred_element_type=jnp.float32)
    scores = constrain(scores, "act_batch", "act_length", "act_vocab")
    top, total, moment = row_statistics(scores, temperature, device)
    picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0] / temperature
    log_total = jnp.log(total)
    probabilities = jnp.exp(scores / temperature - top[..., None]) / total[..., None]
    return (picked - top - log_total, log_total - moment / total), probabilities


def _by_chunks(chunk, xs: tuple[jax.Array, jax.Array], chunk_tokens: int) -> tuple:  # type: ignore[no-untyped-def]
    """Runs `chunk` over slices of the length; rows stay where their device has them."""
    rows, width = xs[1].shape
    columns = max(1, min(width, chunk_tokens // rows))
    chunks = -(-width // columns)
    pad = chunks * columns - width

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(rows, chunks, columns, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(rows, chunks * columns, *x.shape[3:])[:, :width]

    return jax.tree.map(join, jax.lax.map(chunk, jax.tree.map(split, xs)))

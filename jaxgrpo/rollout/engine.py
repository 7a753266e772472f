"""Sampling: one prefill per prompt, one compiled loop for all completions.

Prompts are run once and their caches shared by the group. The loop stops when every row has ended
or the cap is reached. On a GPU it goes on with a smaller batch whenever half of its rows have
ended, so that a few long completions do not run at the price of all. Weights are an argument in
the decode form (`model.api.make_decode_weights`). On a mesh each device samples its own rows until
they have ended, unless the model axis splits the weights (`mesh.on_each_shard`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.config import RolloutConfig
from jaxgrpo.devices import Device
from jaxgrpo.mesh import constrain, on_each_shard
from jaxgrpo.model.api import (
    PromptCache,
    QwenConfig,
    cache_slots,
    decode_step,
    init_completion_cache,
    logits,
    prefill,
)
from jaxgrpo.rollout.sampling import draws_needed, row_draws, row_keys, sample
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.types import FINISH_LENGTH, FINISH_STOP_STRING, FINISH_STOP_TOKEN, Rollout, Tree


@runtime_checkable
class Generate(Protocol):
    """The jitted sampler; on a mesh its arguments and results are split along the batch."""

    def __call__(
        self,
        weights: Tree,
        prompt_tokens: Int[Array, "P S"],
        prompt_mask: Bool[Array, "P S"],
        key: jax.Array,
        caps: Int[Array, " B"] | None = None,
    ) -> Rollout: ...


MAX_BATCH_SIZES = 4
"""Each is a program of its own to compile; a fifth would save 3 % of log-normal lengths' time."""

MIN_BATCH = 32
"""Below it a token step costs what the weights cost to read, whatever the batch."""


class _Rows(NamedTuple):
    """What belongs to the rows being sampled, and does not change."""

    number: Int[Array, " B"]
    prompt_of: Int[Array, " B"]
    keys: Array
    draws: Float[Array, "C B k"]
    caps: Int[Array, " B"]


class _Loop(NamedTuple):
    """What the decode loop carries; `t` tokens of every row have been sampled."""

    t: Int[Array, ""]
    cache: tuple
    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]
    newest: Int[Array, " B"]
    lengths: Int[Array, " B"]
    finish_reasons: Int[Array, " B"]
    done: Bool[Array, " B"]
    stop_state: Int[Array, " B"]


class _Found(NamedTuple):
    """What is kept of the loop."""

    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]
    lengths: Int[Array, " B"]
    finish_reasons: Int[Array, " B"]


def _found(loop: _Loop) -> _Found:
    return _Found(loop.tokens, loop.logprobs, loop.lengths, loop.finish_reasons)


def batch_sizes(rows: int, device: Device) -> tuple[int, ...]:
    """The batches in which `rows` rows are sampled, each for when no more rows are left: halves on
    a GPU. Where the model axis splits the weights another batch would move caches between devices;
    on a CPU it costs more to compile than it saves."""
    sizes = [rows]
    if device.single_gpu:
        while len(sizes) < MAX_BATCH_SIZES and sizes[-1] % 2 == 0 and sizes[-1] >= 2 * MIN_BATCH:
            sizes.append(sizes[-1] // 2)
    return tuple(sizes)


@dataclass(frozen=True)
class _Sampler:
    """What sampling is compiled for; of the stop rules, what is looked up by token, on the host: an
    array on a mesh's devices cannot be a constant of what each of them runs by itself."""

    model: QwenConfig
    rollout: RolloutConfig
    group_size: int
    stop_ids: Int[np.ndarray, " ids"]
    transitions: Int[np.ndarray, "states V"] | None

    def rows(self, keys: Array, caps: Int[Array, " B"] | None) -> _Rows:
        """A row for every key, and all the draws they need."""
        count = len(keys)
        number = jnp.arange(count)
        width = self.rollout.max_completion_tokens
        return _Rows(
            number=number,
            prompt_of=number // self.group_size,
            keys=keys,
            draws=row_draws(keys, jnp.arange(width), draws_needed(self.rollout.top_p)),
            caps=jnp.full(count, width, jnp.int32) if caps is None else caps,
        )

    def empty(self, count: int) -> _Loop:
        """So many rows of which nothing has been sampled."""
        width = self.rollout.max_completion_tokens
        return _Loop(
            t=jnp.zeros((), jnp.int32),
            cache=init_completion_cache(self.model, count, width),
            tokens=jnp.zeros((count, width), jnp.int32),
            logprobs=jnp.zeros((count, width), jnp.float32),
            newest=jnp.zeros(count, jnp.int32),
            lengths=jnp.zeros(count, jnp.int32),
            finish_reasons=jnp.full(count, FINISH_LENGTH, jnp.int32),
            done=jnp.zeros(count, bool),
            stop_state=jnp.zeros(count, jnp.int32),
        )

    def draw(self, weights: Tree, rows: _Rows, hidden: jax.Array, loop: _Loop) -> _Loop:
        """Samples token `t` of every row from `hidden` and books it."""
        t, width = loop.t, self.rollout.max_completion_tokens
        count = draws_needed(self.rollout.top_p)
        tokens, logprobs = sample(
            constrain(logits(self.model, weights, hidden), "act_batch", "act_vocab"),
            rows.draws[t],
            lambda number: row_draws(rows.keys, (number * width + t)[None], count)[0],
            self.rollout,
            self.model.device,
        )
        live = ~loop.done
        tokens = jnp.where(live, tokens, 0)
        by_token = live & jnp.any(tokens[:, None] == self.stop_ids[None, :], axis=1)
        by_string = jnp.zeros_like(by_token)
        stop_state = loop.stop_state
        if self.transitions is not None:
            following = jnp.asarray(self.transitions)[stop_state, tokens]
            stop_state = jnp.where(live, following, stop_state)
            by_string = live & (stop_state == self.transitions.shape[0] - 1) & ~by_token
        reason = jnp.where(by_token, FINISH_STOP_TOKEN, loop.finish_reasons)
        reason = jnp.where(by_string, FINISH_STOP_STRING, reason)
        logprobs = jnp.where(live, logprobs, 0.0)
        return loop._replace(
            t=t + 1,
            tokens=jax.lax.dynamic_update_slice(loop.tokens, tokens[:, None], (0, t)),
            logprobs=jax.lax.dynamic_update_slice(loop.logprobs, logprobs[:, None], (0, t)),
            newest=tokens,
            lengths=loop.lengths + live,
            finish_reasons=reason,
            done=loop.done | by_token | by_string | (t + 1 >= rows.caps),
            stop_state=stop_state,
        )

    def run(
        self,
        weights: Tree,
        prompts: PromptCache,
        rows: _Rows,
        loop: _Loop,
        enough: int,
        prompt_of: Int[Array, " B"] | None = None,
    ) -> _Loop:
        """Token by token, until no more than `enough` rows are left."""

        def body(loop: _Loop) -> _Loop:
            hidden, cache = decode_step(
                self.model, weights, prompts, loop.cache, loop.newest, loop.t - 1, prompt_of
            )
            return self.draw(weights, rows, hidden, loop._replace(cache=cache))

        def unfinished(loop: _Loop) -> Bool[Array, ""]:
            return (loop.t < self.rollout.max_completion_tokens) & (jnp.sum(~loop.done) > enough)

        return jax.lax.while_loop(unfinished, body, loop)

    def sample(
        self,
        weights: Tree,
        prompt_tokens: Int[Array, "P S"],
        prompt_mask: Bool[Array, "P S"],
        keys: Array,
        caps: Int[Array, " B"] | None,
        arm: Int[Array, " P"] | None,
    ) -> Rollout:
        """Completes prompts with a row for each of B keys; `arm` says whose prompt each is."""
        sizes = batch_sizes(len(keys), self.model.device)
        rows = self.rows(keys, caps)
        slots = cache_slots(self.model, prompt_tokens.shape[1])
        unused = slots - prompt_tokens.shape[1]
        prompt_tokens = jnp.pad(prompt_tokens, ((0, 0), (unused, 0)))
        prompt_mask = jnp.pad(prompt_mask, ((0, 0), (unused, 0)))
        hidden, prompts = prefill(self.model, weights, prompt_tokens, prompt_mask, arm)
        hidden = constrain(jnp.repeat(hidden, self.group_size, axis=0), "act_batch", "act_embed")
        loop = self.draw(weights, rows, hidden, self.empty(sizes[0]))
        enough = (*sizes[1:], 0)
        loop = self.run(weights, prompts, rows, loop, enough[0])
        found = _found(loop)
        for size, left in zip(sizes[1:], enough[1:], strict=True):
            rows, loop = _shrink(rows, loop, size)
            loop = self.run(weights, prompts, rows, loop, left, rows.prompt_of)
            found = jax.tree.map(lambda x, y, to=rows.number: x.at[to].set(y), found, _found(loop))
        width = self.rollout.max_completion_tokens
        mask = jnp.arange(width)[None, :] < found.lengths[:, None]
        return Rollout(mask=mask, **found._asdict())


def make_generate(
    model_config: QwenConfig, rollout: RolloutConfig, stop: StopRules, group_size: int
) -> Generate:
    """Jits (weights, prompt_tokens [P, S], prompt_mask [P, S], key, caps [B] = none) -> Rollout of
    B = P*G rows. With a key for each of A arms, prompts [A*P, S], arm by arm, give A*B rows, each
    arm's as if it were sampled alone with its key.

    Args:
        rollout: cap, temperature and cuts; static, so that what is off costs nothing.
        stop: what ends a completion.
        group_size: completions per prompt, row p*G+g being completion g of prompt p.

    `caps` end rows earlier than the cap of all.
    """
    stop_ids, of_shard = np.asarray(stop.token_ids, np.int32), model_config.of_shard
    sampler = _Sampler(of_shard, rollout, group_size, stop_ids, stop.transitions)

    def sample_with(weights: Tree, own: Tree, *rows: Any) -> Rollout:
        return sampler.sample({**weights, **own}, *rows)

    sample = on_each_shard(sample_with, model_config.device)

    @functools.partial(jax.jit, compiler_options=of_shard.device.decode_options)
    def generate(
        weights: Tree,
        prompt_tokens: Int[Array, "P S"],
        prompt_mask: Bool[Array, "P S"],
        key: jax.Array,
        caps: Int[Array, " B"] | None = None,
    ) -> Rollout:
        arms, prompts = jnp.atleast_1d(key), len(prompt_tokens)
        rows = prompts // len(arms) * group_size
        keys = jax.vmap(lambda arm: row_keys(arm, rows))(arms).reshape(-1)
        shards = model_config.device.arm_shards(len(arms))
        arm, each = None, len(arms) // shards
        if each > 1:
            arm = jnp.repeat(jnp.arange(len(arms)) % each, prompts // len(arms))
        # Of arms that are spread over devices each device has layers of its own.
        layers, tables = {}, weights
        if shards > 1:
            layers = {"layers": weights["layers"]}
            tables = {name: table for name, table in weights.items() if name != "layers"}
        return sample(tables, layers, prompt_tokens, prompt_mask, keys, caps, arm)

    return generate


def _shrink(rows: _Rows, loop: _Loop, size: int) -> tuple[_Rows, _Loop]:
    """The rows not yet done, filled up to `size` with others, and what belongs to them."""
    kept = jnp.argsort(loop.done, stable=True)[:size]

    def take(x: jax.Array) -> jax.Array:
        return x[kept]

    of_rows, of_loop = rows._asdict(), loop._asdict()
    draws, t = of_rows.pop("draws"), of_loop.pop("t")
    return (
        _Rows(draws=draws[:, kept], **jax.tree.map(take, of_rows)),
        _Loop(t=t, **jax.tree.map(take, of_loop)),
    )

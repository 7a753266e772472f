"""The sampling loop against the full forward, and its ends."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import MODULES, RolloutConfig
from jaxgrpo.devices import Device, device_of
from jaxgrpo.mesh import MeshConfig, Purpose, fold_key, make_mesh, replicate, shard_rows, to_host
from jaxgrpo.model.api import (
    QwenConfig,
    device_plan,
    init_base,
    init_lora,
    make_decode_weights,
)
from jaxgrpo.model.attention import causal_attention, split_like_queries
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.rollout import engine
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.types import (
    FINISH_LENGTH,
    FINISH_STOP_STRING,
    FINISH_STOP_TOKEN,
    Adapters,
    check_rollout,
)
from tests.rows import completion_logprobs

CONFIG = QwenConfig(61, 48, 80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8)
# As Qwen3 has it: heads that are more than the hidden size, and norms of their own.
QK_NORM = dataclasses.replace(CONFIG, head_dim=16, qkv_bias=False, qk_norm=True)
GROUP, WIDTH = 3, 12
PLAN = RankPlan(
    {"q_proj": np.array([1, 2, 0]), "up_proj": np.array([4, 0, 2])}, 4, 8.0, "rslora", 4
)
NEVER = StopRules((10**6,))


@functools.cache
def _adapters(config=CONFIG):
    lora = init_lora(config, PLAN, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), lora)
    return Adapters(lora, device_plan(PLAN))


@functools.cache
def _base(config=CONFIG):
    base = init_base(config, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.15 * jax.random.normal(jax.random.key(5), x.shape), base)


def _prompts(prompts=4, slots=7):
    tokens = np.random.default_rng(0).integers(2, 61, (prompts, slots)).astype(np.int32)
    lengths = np.array([7, 4, 1, 6])[:prompts]
    return tokens, np.arange(slots)[None, :] >= slots - lengths[:, None]


def _generate(
    stop=NEVER, key=0, rollout=None, prompts=None, caps=None, config=CONFIG, weights=None
):
    rollout = rollout or RolloutConfig(max_completion_tokens=WIDTH, temperature=0.9)
    weights = make_decode_weights(config, *(weights or (_base(), _adapters())))
    tokens, mask = prompts or _prompts()
    generate = make_generate(config, rollout, stop, GROUP)
    out = generate(weights, jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(key), caps)
    check_rollout(out)
    return jax.tree.map(np.asarray, out)


def _full_forward(out, temperature, config=CONFIG):
    tokens, mask = _prompts()
    rows = np.zeros((len(out.tokens), tokens.shape[1] + WIDTH), np.int32)
    lengths = np.repeat(mask.sum(1), GROUP)
    for row, length in enumerate(lengths):
        rows[row, :length] = tokens[row // GROUP][mask[row // GROUP]]
        rows[row, length : length + WIDTH] = out.tokens[row]
    score = functools.partial(completion_logprobs, config, temperature=temperature, chunk_tokens=16)
    logprobs, _ = jax.jit(score)(_base(config), _adapters(config), rows, lengths, out.tokens)
    return np.asarray(logprobs)


@pytest.mark.parametrize(("config", "temperature"), [(CONFIG, 0.9), (CONFIG, 0.0), (QK_NORM, 0.9)])
def test_cached_decode_equals_full_forward(config, temperature):
    rollout = RolloutConfig(max_completion_tokens=WIDTH, temperature=temperature)
    weights = _base(config), _adapters(config)
    out = _generate(StopRules((5, 9)), rollout=rollout, config=config, weights=weights)
    want = _full_forward(out, temperature or 1.0, config)
    chex.assert_trees_all_close(out.logprobs, np.where(out.mask, want, 0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_in_bfloat16_the_sampler_stays_the_policy_however_small_the_adapters(size):
    """|B| of one size at rank 1: sampler and trainer differ by no more than with B = 0, where all
    that differs is rounding (1.2 times the mean absolute difference of log-probs). Added to
    bfloat16 weights nine tenths of an update of 1e-4 would be lost."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _base())
    ranks = RankPlan({m: np.ones(3, int) for m in MODULES}, 1, 2.0, "constant", 1)
    plan, fresh = device_plan(ranks), init_lora(config, ranks, jax.random.key(1))
    tokens, mask = _prompts()
    generate = make_generate(config, RolloutConfig(WIDTH, temperature=1.0), NEVER, 16)

    def drift(size):
        lora = {m: {"a": ab["a"], "b": jnp.full_like(ab["b"], size)} for m, ab in fresh.items()}
        adapters = Adapters(lora, plan)
        weights = make_decode_weights(config, base, adapters)
        out = generate(weights, jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(0))
        lengths = np.repeat(mask.sum(1), 16)
        rows = np.zeros((len(out.tokens), tokens.shape[1] + WIDTH), np.int32)
        for row, length in enumerate(lengths):
            rows[row, :length] = tokens[row // 16][mask[row // 16]]
            rows[row, length : length + WIDTH] = out.tokens[row]
        score = functools.partial(completion_logprobs, config, temperature=1.0, chunk_tokens=64)
        want, _ = jax.jit(score)(base, adapters, rows, lengths, out.tokens)
        return float(jnp.mean(jnp.abs(want - out.logprobs)))

    assert drift(size) <= 1.2 * drift(0.0)


def test_rows_end_at_their_stop_token_and_keep_it():
    out = _generate(StopRules(tuple(range(2, 14))))
    assert (out.finish_reasons == FINISH_STOP_TOKEN).any()
    for row, length in enumerate(out.lengths):
        stops = np.isin(out.tokens[row], range(2, 14))
        assert out.mask[row].sum() == length
        assert not out.tokens[row, length:].any() and not out.logprobs[row, length:].any()
        if out.finish_reasons[row] == FINISH_STOP_TOKEN:
            assert stops[length - 1] and not stops[: length - 1].any()
        else:
            assert length == WIDTH and not stops[:length].any()


def test_without_a_stop_every_row_reaches_the_cap():
    out = _generate()
    assert (out.lengths == WIDTH).all() and (out.finish_reasons == FINISH_LENGTH).all()


def test_stopping_changes_no_token_before_the_stop():
    free, stopped = _generate(), _generate(StopRules(tuple(range(2, 14))))
    np.testing.assert_array_equal(np.where(stopped.mask, free.tokens, 0), stopped.tokens)


def test_a_shrinking_batch_changes_nothing(monkeypatch):
    """What one GPU does when rows have ended: the others go on in smaller and smaller batches."""
    caps = jnp.asarray([12, 1, 3, 5, 2, 2, 9, 1, 4, 12, 7, 2])
    want = _generate(StopRules((5, 9)), caps=caps)
    monkeypatch.setattr(engine, "MIN_BATCH", 3)
    config = dataclasses.replace(CONFIG, device=Device("gpu"))
    assert engine.batch_sizes(12, config.device) == (12, 6, 3)
    got = _generate(StopRules((5, 9)), caps=caps, config=config)
    chex.assert_trees_all_equal(got.tokens, want.tokens)
    chex.assert_trees_all_close(got, want, atol=1e-5, rtol=0)
    assert (got.lengths <= caps).all()
    assert len(set(got.lengths.tolist())) > 5


def test_stop_string_ends_a_row_where_the_table_says():
    # Two states and the end: seen after an even token directly followed by an odd one.
    even = np.arange(61) % 2 == 0
    table = np.stack([even.astype(np.int32), np.where(even, 1, 2), np.full(61, 2)]).astype(np.int32)
    out = _generate(StopRules((10**6,), table))
    assert (out.finish_reasons == FINISH_STOP_STRING).any()
    for row, length in enumerate(out.lengths):
        tokens = out.tokens[row, :length]
        pairs = (tokens[:-1] % 2 == 0) & (tokens[1:] % 2 == 1)
        if out.finish_reasons[row] == FINISH_STOP_STRING:
            assert pairs[-1] and not pairs[:-1].any()
        else:
            assert not pairs.any()


def test_a_group_shares_its_prompt():
    """Each prompt alone gives the same greedy completion as in the batch, for all its rows."""
    rollout = RolloutConfig(max_completion_tokens=WIDTH, temperature=0.0)
    out = _generate(rollout=rollout)
    tokens, mask = _prompts()
    for p in range(4):
        alone = _generate(rollout=rollout, prompts=(tokens[p : p + 1], mask[p : p + 1]))
        for g in range(GROUP):
            np.testing.assert_array_equal(out.tokens[p * GROUP + g], alone.tokens[0])


def test_left_padding_changes_nothing():
    tokens, mask = _prompts()
    wide = np.pad(tokens, ((0, 0), (5, 0))), np.pad(mask, ((0, 0), (5, 0)))
    chex.assert_trees_all_close(_generate(), _generate(prompts=wide), atol=1e-4, rtol=0)


def test_two_steps_never_draw_the_same_noise():
    generate = make_generate(
        CONFIG, RolloutConfig(max_completion_tokens=WIDTH, temperature=50.0), NEVER, GROUP
    )
    weights = make_decode_weights(CONFIG, _base(), None)
    tokens, mask = map(jnp.asarray, _prompts())
    seen = set()
    for step in range(4):
        out = generate(weights, tokens, mask, fold_key(0, step, Purpose.ROLLOUT))
        seen |= {tuple(row) for row in np.asarray(out.tokens).tolist()}
    assert len(seen) == 4 * 4 * GROUP
    again = generate(weights, tokens, mask, fold_key(0, 3, Purpose.ROLLOUT))
    chex.assert_trees_all_equal(out, again)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1)], ids=str)
def test_eight_devices_sample_what_one_does_each_its_own_rows(monkeypatch, sizes):
    # As on a GPU: a device goes on with a smaller batch as soon as its own rows have ended.
    monkeypatch.setattr(engine, "batch_sizes", lambda rows, device: (rows, max(1, rows // 2)))
    tokens, mask = _prompts()
    tokens, mask = np.concatenate([tokens, tokens + 1]), np.concatenate([mask, mask])
    rollout = RolloutConfig(max_completion_tokens=WIDTH, temperature=0.9)
    # No draw of this key lies within rounding of the edge between two tokens.
    stop, key = StopRules((3, 5, 8, 13, 21, 34)), jax.random.key(1)
    weights = make_decode_weights(CONFIG, _base(), _adapters())
    generate = make_generate(CONFIG, rollout, stop, GROUP)
    one = to_host(generate(weights, jnp.asarray(tokens), jnp.asarray(mask), key))
    mesh = make_mesh(MeshConfig(*sizes))
    config = dataclasses.replace(CONFIG, device=device_of(mesh))
    generate = make_generate(config, rollout, stop, GROUP)
    with jax.set_mesh(mesh):
        weights = make_decode_weights(config, *replicate(mesh, (_base(), _adapters())))
        assert "qkv" in weights["layers"][0]  # as on one device
        lowered = generate.lower(weights, *shard_rows(mesh, (tokens, mask)), key)
        many = to_host(generate(weights, *shard_rows(mesh, (tokens, mask)), key))
    # Where the whole batch is not asked whether it has ended, no device waits for another.
    assert not re.search("all-gather|all-reduce|collective-permute", lowered.compile().as_text())
    chex.assert_trees_all_close(one, many, atol=1e-5, rtol=0)
    assert len(np.unique(one.lengths)) > 2


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_key_heads_are_split_as_the_query_heads_are(parts):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, heads, 8)), jnp.float32) for heads in (8, 2, 2))
    mask = jnp.ones((2, 5), bool)
    of_kernel = [split_like_queries(x, parts) for x in (k, v)]
    assert of_kernel[0].shape[2] % parts == 0
    one = causal_attention(q, k, v, mask, None, CONFIG.device)
    repeated = causal_attention(q, *of_kernel, mask, None, CONFIG.device)
    chex.assert_trees_all_close(one, repeated, atol=1e-6, rtol=0)


ARMS = (
    PLAN,
    RankPlan({"q_proj": np.array([4, 1, 3]), "up_proj": np.array([0, 0, 0])}, 4, 8.0, "rslora", 4),
    RankPlan({"q_proj": np.array([2, 2, 2]), "up_proj": np.array([3, 1, 4])}, 4, 16.0, "rslora", 4),
)


@functools.cache
def _arms():
    """Adapters of three arms, each its own plan and values."""
    found = []
    for number, plan in enumerate(ARMS):
        lora = init_lora(CONFIG, plan, jax.random.key(number))
        noise = jax.random.key(100 + number)
        lora = jax.tree.map(lambda x, k=noise: x + 0.3 * jax.random.normal(k, x.shape), lora)
        found.append(Adapters(lora, device_plan(plan)))
    return found


@pytest.mark.parametrize("shrinks", [False, True], ids=["one batch", "while the batch shrinks"])
def test_rows_of_an_arm_are_sampled_as_if_it_were_alone(monkeypatch, shrinks):
    if shrinks:
        monkeypatch.setattr(engine, "batch_sizes", lambda rows, device: (rows, rows // 2, 3))
    keys = jax.random.split(jax.random.key(7), len(ARMS))
    rollout = RolloutConfig(max_completion_tokens=WIDTH, temperature=0.9)
    tokens, mask = (jnp.asarray(x) for x in _prompts())
    stop = StopRules((3, 5, 8, 13, 21, 34))
    generate = make_generate(CONFIG, rollout, stop, GROUP)
    # Prompts of its own for every arm: the first's, backwards.
    prompts = [(tokens, mask), (tokens[::-1], mask[::-1]), (tokens, mask)]
    together = generate(
        make_decode_weights(CONFIG, _base(), tuple(_arms())),
        *(jnp.concatenate(x) for x in zip(*prompts, strict=True)),
        keys,
    )
    check_rollout(together)
    count = len(tokens) * GROUP
    for number, (adapters, own) in enumerate(zip(_arms(), prompts, strict=True)):
        alone = generate(make_decode_weights(CONFIG, _base(), adapters), *own, keys[number])
        mine = jax.tree.map(lambda x, n=number: x[n * count : (n + 1) * count], together)
        for name in ("tokens", "lengths", "finish_reasons", "mask"):
            chex.assert_trees_all_equal(getattr(mine, name), getattr(alone, name))
        chex.assert_trees_all_close(mine.logprobs, alone.logprobs, rtol=1e-5)
    assert len(np.unique(together.lengths)) > 2


def test_arms_on_a_mesh_are_those_of_one_device():
    """Also where each of two devices has the adapters of two of them alone."""
    arms = (*_arms(), _arms()[0])
    keys = jax.random.split(jax.random.key(7), len(arms))
    tokens, mask = (np.tile(x, (len(arms), 1)) for x in _prompts())
    rollout = RolloutConfig(max_completion_tokens=WIDTH, temperature=0.9)
    found = []
    for sizes in (MeshConfig(1, 1, 1), MeshConfig(2, 2, 2), MeshConfig(2, 1, 1)):
        mesh = make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.model])
        config = dataclasses.replace(CONFIG, device=device_of(mesh))
        generate = make_generate(config, rollout, NEVER, GROUP)
        with jax.set_mesh(mesh):
            weights = make_decode_weights(config, *replicate(mesh, (_base(), arms)))
            rows = shard_rows(mesh, (tokens, mask))
            found.append(to_host(generate(weights, *rows, keys)))
    assert device_of(mesh).arm_shards(len(arms)) == 2
    # Two arms' inner values of rank 4, under one kernel of each device.
    assert weights["layers"][0]["qkv"].a.shape == (2 * CONFIG.hidden_size, 2 * PLAN.max_rank)
    for many in found[1:]:
        chex.assert_trees_all_equal(found[0].tokens, many.tokens)
        chex.assert_trees_all_close(found[0].logprobs, many.logprobs, atol=1e-5)

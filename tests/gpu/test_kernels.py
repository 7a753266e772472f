"""The programs that only a GPU runs, against the plain ones: JAXGRPO_TEST_ACCELERATOR=1
python -m pytest -m gpu tests/gpu."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import GrpoConfig, MeshConfig, RolloutConfig
from jaxgrpo.devices import device_of
from jaxgrpo.grpo.loss import token_losses, token_weights
from jaxgrpo.grpo.step import StepSettings, make_gradients
from jaxgrpo.mesh import make_mesh
from jaxgrpo.model import kv_cache
from jaxgrpo.model.api import (
    QwenConfig,
    device_plan,
    init_base,
    init_lora,
    make_decode_weights,
)
from jaxgrpo.model.attention import DecodePosition, apply_rotary, rotary_tables
from jaxgrpo.model.block_statistics import block_sums, kernel_statistics
from jaxgrpo.model.decode_attention import decode_attention
from jaxgrpo.model.gated_product import ROWS, gated_product, make_tiles, use_tiles
from jaxgrpo.model.kv_cache import plain_attention, write_slot
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.rollout import engine
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.types import Adapters
from tests.rows import completion_logprobs, on_device, random_batch, random_rows

pytestmark = pytest.mark.gpu

SHAPES = {"vocab_size": 1280, "hidden_size": 768, "intermediate_size": 1024}
LAYERS, GROUP, WIDTH, TEMPERATURE = 3, 8, 48, 0.9
PLAN = RankPlan(
    {
        "q_proj": np.array([8, 2, 0]),
        "v_proj": np.array([3, 4, 16]),
        "o_proj": np.array([1, 0, 3]),
        "up_proj": np.array([4, 16, 2]),
        "down_proj": np.array([2, 3, 1]),
    },
    16, 32.0, "rslora", 16,
)  # fmt: skip


def device():
    return device_of(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


FAMILIES = {
    "qwen2": {"num_heads": 6, "num_kv_heads": 1},
    "qwen3": {"num_heads": 12, "num_kv_heads": 4, "qkv_bias": False, "qk_norm": True},
}
"""Heads that make up the hidden size, and with norms heads that are twice as much."""


def make_config(dtype, family="qwen2"):
    return QwenConfig(
        **SHAPES,
        **FAMILIES[family],
        num_layers=LAYERS,
        head_dim=128,
        dtype=dtype,
        device=device(),
    )


def make_weights(config, seed=0):
    base = init_base(config, jax.random.key(seed))
    lora = init_lora(config, PLAN, jax.random.key(1))
    return base, jax.tree.map(
        lambda x: x + 0.01 * jax.random.normal(jax.random.key(2), x.shape), lora
    )


def make_prompts(prompts=32, slots=96):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPES["vocab_size"], (prompts, slots)).astype(np.int32)
    lengths = rng.integers(1, slots + 1, prompts)
    return tokens, np.arange(slots)[None, :] >= slots - lengths[:, None]


@pytest.mark.parametrize("slot", [0, 31, 32, 200])
def test_decode_attention_of_bfloat16(slot):
    """Within bfloat16's rounding of the plain computation in float32 on the same values."""
    rng = np.random.default_rng(slot)
    prompts, group, slots, width = 5, 4, 128, 256
    config = QwenConfig(61, 12 * 128, 80, num_layers=1, num_heads=12, num_kv_heads=2, head_dim=128)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    qkv = array(prompts * group, 16, 128)
    prompt = {name: array(prompts, 2, slots, 128) for name in ("k", "v")}
    own = {name: array(prompts * group, 2, width, 128) for name in ("k", "v")}
    lengths = jnp.asarray([128, 1, 40, 96, 127])
    rope = rotary_tables(config, jnp.repeat(lengths, group) + slot)
    q, k = (apply_rotary(x, rope) for x in (qkv[:, :12], qkv[:, 12:14]))
    want_own = write_slot(own, k, qkv[:, 14:], jnp.int32(slot))
    mask = jnp.arange(slots)[None, :] >= slots - lengths[:, None]
    f32 = jax.tree.map(lambda x: x.astype(jnp.float32), (q, prompt, want_own))
    want = plain_attention(f32[0], f32[1], mask, f32[2], jnp.int32(slot))
    rows = jnp.arange(prompts * group)
    order = jnp.asarray(rng.permutation(prompts * group))
    shuffled, rope, own = jax.tree.map(lambda x: x[order], (qkv, rope, own))
    at = DecodePosition(rope, mask, (rows // group)[order], jnp.int32(slot))
    got, cache = jax.jit(decode_attention)(shuffled, at, prompt, own)
    chex.assert_trees_all_close(got.astype(jnp.float32), want[order], atol=2e-2, rtol=2e-2)
    error = jnp.linalg.norm(got.astype(jnp.float32) - want[order]) / jnp.linalg.norm(want)
    assert error < 4e-3, error
    # The new key is rounded once more or less, everything else is the same bits.
    want_own = jax.tree.map(lambda x: x[order].astype(jnp.float32), want_own)
    cache = jax.tree.map(lambda x: x.astype(jnp.float32), cache)
    chex.assert_trees_all_close(cache, want_own, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("inner", "features"), [(1536, 8960), (896, 4864), (768, 1024)])
def test_gated_product(inner, features):
    """Within bfloat16's rounding of float32 on the same values; exact zeros where it is padded."""
    x, gate, up = (
        (jax.random.normal(jax.random.key(i), shape) * scale).astype(jnp.bfloat16)
        for i, (shape, scale) in enumerate(
            [((ROWS, inner), 1.0), ((inner, features), 0.05), ((inner, features), 0.05)]
        )
    )
    tiles = make_tiles(gate, up, device().cores)
    assert use_tiles(make_config("bfloat16"))
    got = jax.jit(gated_product)(x, tiles).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        x, gate, up = (y.astype(jnp.float32) for y in (x, gate, up))
        want = jax.nn.silu(x @ gate) * (x @ up)
    chex.assert_trees_all_close(got[:, :features], want, rtol=1e-2, atol=1e-3)
    assert not got[:, features:].any()


@pytest.mark.parametrize("vocab", [1280, 151936])
def test_block_statistics(vocab):
    logits = jax.random.normal(jax.random.key(0), (64, vocab)) * 5
    top, sums, moments = kernel_statistics(logits, TEMPERATURE, entropy=True)
    want = jnp.max(logits / TEMPERATURE, axis=-1)
    chex.assert_trees_all_close(top, want, rtol=1e-6)
    chex.assert_trees_all_close(sums, block_sums(logits / TEMPERATURE, want), rtol=1e-5, atol=1e-12)
    scores = logits / TEMPERATURE - want[:, None]
    moment = jnp.sum(jnp.exp(scores) * scores, axis=1)
    chex.assert_trees_all_close(moments.sum(axis=1), moment, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_sampled_log_probs_equal_the_trainers(monkeypatch, dtype, tolerance, family):
    """Through shrinking batches; mean difference in bfloat16 <= 0.01."""
    monkeypatch.setattr(engine, "MIN_BATCH", 16)
    with jax.default_matmul_precision("highest"):
        config = make_config(dtype, family)
        base, lora = make_weights(config)
        tokens, mask = make_prompts()
        rollout = RolloutConfig(max_completion_tokens=WIDTH, temperature=TEMPERATURE)
        generate = make_generate(config, rollout, StopRules((7, 11, 500, 900)), GROUP)
        plan = device_plan(PLAN)
        weights = make_decode_weights(config, base, Adapters(lora, plan))
        caps = jnp.asarray(np.random.default_rng(1).integers(1, WIDTH + 1, len(tokens) * GROUP))
        out = generate(weights, jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(3), caps)
        assert len(engine.batch_sizes(len(out.tokens), config.device)) > 2
        rows, lengths = right_padded(tokens, mask, out)
        want, _ = completion_logprobs(
            config, base, Adapters(lora, plan), rows, lengths, out.tokens, temperature=TEMPERATURE,
            chunk_tokens=256,
        )  # fmt: skip
    drift = np.abs(np.where(out.mask, out.logprobs - want, 0))
    mean = drift[np.asarray(out.mask)].mean()
    assert mean <= 0.01 and drift.max() <= tolerance, (mean, drift.max())
    assert (np.asarray(out.lengths) <= np.asarray(caps)).all()


def right_padded(tokens, mask, out):
    lengths = np.repeat(mask.sum(1), GROUP).astype(np.int32)
    rows = np.zeros((len(lengths), tokens.shape[1] + WIDTH), np.int32)
    for row, length in enumerate(lengths):
        prompt = row // GROUP
        rows[row, :length] = tokens[prompt][mask[prompt]]
        rows[row, length : length + WIDTH] = out.tokens[row]
    return jnp.asarray(rows), jnp.asarray(lengths)


def test_shrinking_samples_the_same_tokens(monkeypatch):
    """In float32 and by the plain program: the batch a row is in changes nothing."""
    config = make_config("float32")
    base, lora = make_weights(config)
    tokens, mask = make_prompts()
    rollout = RolloutConfig(max_completion_tokens=WIDTH, temperature=TEMPERATURE)
    weights = make_decode_weights(config, base, Adapters(lora, device_plan(PLAN)))
    caps = jnp.asarray(np.random.default_rng(1).integers(1, WIDTH + 1, len(tokens) * GROUP))
    found = []
    for least in (16, 10**6):
        monkeypatch.setattr(engine, "MIN_BATCH", least)
        generate = make_generate(config, rollout, StopRules((7,)), GROUP)
        with jax.default_matmul_precision("highest"):
            key = jax.random.key(3)
            found.append(generate(weights, jnp.asarray(tokens), jnp.asarray(mask), key, caps))
    same = np.asarray(found[0].tokens == found[1].tokens).all(axis=1).mean()
    # A draw that falls on the edge between two tokens may go either way.
    assert same >= 0.97, same
    assert not kv_cache.use_kernel(config)


@pytest.mark.parametrize(
    ("family", "remat"), [("qwen2", "full"), ("qwen2", "products"), ("qwen3", "products")]
)
def test_packed_gradients_of_bfloat16(family, remat):
    """cuDNN attention, fused adapters and written-out layers against float32 on whole rows."""
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 1280, 8, GROUP, 64, WIDTH)
    # About what weights at random give every token.
    batch = on_device(random_batch(rows, micro_batches=4, sampler_logprobs=-7.0 * rows.mask))
    assert int(batch.packing.count) > 1
    grpo = GrpoConfig(prompts_per_step=8, group_size=GROUP, logprob_chunk_tokens=256)
    plan = device_plan(PLAN)
    exact = make_config("float32", family)
    base, lora = make_weights(exact)

    def whole_loss(lora):
        logprobs, _ = completion_logprobs(
            exact, base, Adapters(lora, plan), *rows.whole,
            temperature=TEMPERATURE, chunk_tokens=256,
        )  # fmt: skip
        weights = token_weights(grpo.loss, batch.loss_mask, WIDTH)
        return jnp.sum(weights * token_losses(grpo, logprobs, batch))

    with jax.default_matmul_precision("highest"):
        loss, want = jax.jit(jax.value_and_grad(whole_loss))(lora)
    config = make_config("bfloat16", family)
    gradients = make_gradients(config, StepSettings(grpo, TEMPERATURE, WIDTH, remat))
    rounded = jax.tree.map(lambda x: x.astype(config.compute_dtype), base)
    got_loss, got = jax.jit(gradients)(rounded, Adapters(lora, plan), batch)[:2]
    chex.assert_trees_all_close(got_loss, loss, atol=2e-3)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = jnp.linalg.norm(x - y) / jnp.maximum(jnp.linalg.norm(y), 1e-12)
        assert error < 4e-2, (jax.tree_util.keystr(path), error)

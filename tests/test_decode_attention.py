"""The decode kernel, interpreted, against the plain computation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.model.attention import DecodePosition, apply_rotary, rotary_tables
from jaxgrpo.model.decode_attention import decode_attention
from jaxgrpo.model.kv_cache import plain_attention, write_slot
from jaxgrpo.model.presets import QwenConfig

PROMPTS, GROUP, SLOTS, WIDTH = 3, 2, 64, 64
CONFIG = QwenConfig(61, 6 * 128, 80, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=128)
LENGTHS = np.array([64, 5, 33])


def _inputs(seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    rows = PROMPTS * GROUP
    prompt = {name: array(PROMPTS, 2, SLOTS, 128) for name in ("k", "v")}
    completion = {name: array(rows, 2, WIDTH, 128) for name in ("k", "v")}
    return array(rows, 10, 128), prompt, completion


def _mask():
    return jnp.arange(SLOTS)[None, :] >= SLOTS - LENGTHS[:, None]


def _plain(qkv, rope, prompt, completion, slot):
    q, k, v = qkv[:, :6], qkv[:, 6:8], qkv[:, 8:]
    q, k = apply_rotary(q, rope), apply_rotary(k, rope)
    completion = write_slot(completion, k, v, slot)
    return plain_attention(q, prompt, _mask(), completion, slot), completion


@pytest.mark.parametrize("slot", [0, 1, 31, 32, 63])
@pytest.mark.parametrize("block", [16, 32])
def test_the_kernel_computes_what_plain_xla_does(slot, block):
    qkv, prompt, completion = _inputs()
    rope = rotary_tables(CONFIG, jnp.repeat(jnp.asarray(LENGTHS), GROUP) + slot)
    want = _plain(qkv, rope, prompt, completion, jnp.int32(slot))
    at = DecodePosition(rope, _mask(), None, jnp.int32(slot))
    got = decode_attention(qkv, at, prompt, completion, block=block, interpret=True)
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-5)


def test_rows_may_come_in_any_order():
    qkv, prompt, completion = _inputs(1)
    slot = jnp.int32(7)
    rope = rotary_tables(CONFIG, jnp.repeat(jnp.asarray(LENGTHS), GROUP) + slot)
    want = _plain(qkv, rope, prompt, completion, slot)
    left = jnp.array([5, 0, 3])
    qkv, rope, completion, want = jax.tree.map(lambda x: x[left], (qkv, rope, completion, want))
    at = DecodePosition(rope, _mask(), left // GROUP, slot)
    got = decode_attention(qkv, at, prompt, completion, interpret=True)
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-5)

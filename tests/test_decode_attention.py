"""The decode kernel, interpreted, against the plain computation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.model.decode_attention import decode_attention
from jaxgrpo.model.kv_cache import plain_attention, write_slot
from jaxgrpo.model.presets import Qwen2Config
from jaxgrpo.model.qwen2 import apply_rotary, rotary_tables

PROMPTS, GROUP, SLOTS, WIDTH = 3, 2, 64, 64
CONFIG = Qwen2Config(61, 6 * 128, 80, num_layers=1, num_heads=6, num_kv_heads=2)
LENGTHS = np.array([64, 5, 33])


def _inputs(seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    rows = PROMPTS * GROUP
    prompt = {name: array(PROMPTS, 2, SLOTS, 128) for name in ("k", "v")}
    completion = {name: array(rows, 2, WIDTH, 128) for name in ("k", "v")}
    return array(rows, 10, 128), prompt, completion


def _plain(qkv, rope, prompt, completion, slot):
    q, k, v = qkv[:, :6], qkv[:, 6:8], qkv[:, 8:]
    q, k = apply_rotary(q, rope), apply_rotary(k, rope)
    completion = write_slot(completion, k, v, slot)
    mask = jnp.arange(SLOTS)[None, :] >= SLOTS - LENGTHS[:, None]
    return plain_attention(q, prompt, mask, completion, slot), completion


def _rows_from(prompt_of):
    return jnp.asarray(np.searchsorted(prompt_of, np.arange(PROMPTS + 1)), jnp.int32)


@pytest.mark.parametrize("slot", [0, 1, 31, 32, 63])
@pytest.mark.parametrize("left", [range(6), [0, 3, 5], [4, 5]], ids=["all", "some", "one prompt"])
def test_the_kernel_computes_what_plain_xla_does(slot, left):
    """Also with a group in two programs, and for prompts none of whose rows are left."""
    qkv, prompt, completion = _inputs()
    rope = rotary_tables(CONFIG, jnp.repeat(jnp.asarray(LENGTHS), GROUP) + slot)
    want = _plain(qkv, rope, prompt, completion, jnp.int32(slot))
    left = np.asarray(left)
    got = decode_attention(
        qkv[left],
        (rope[0][left], rope[1][left]),
        prompt,
        jnp.asarray(SLOTS - LENGTHS, jnp.int32),
        _rows_from(left // GROUP),
        jax.tree.map(lambda x: x[left], completion),
        jnp.int32(slot),
        group_size=GROUP,
        interpret=True,
    )
    want = jax.tree.map(lambda x: x[left], want)
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-5)


def test_it_lowers_for_a_gpu():
    """Every Qwen2.5 shape of heads."""
    for heads, kv_heads in ((14, 2), (12, 2), (16, 2), (28, 4)):
        config = Qwen2Config(
            61, heads * 128, 80, num_layers=1, num_heads=heads, num_kv_heads=kv_heads
        )
        rope = rotary_tables(config, jnp.zeros(32, jnp.int32))
        prompt, own = (
            dict.fromkeys("kv", jax.ShapeDtypeStruct((n, kv_heads, 64, 128), jnp.bfloat16))
            for n in (4, 32)
        )
        qkv = jax.ShapeDtypeStruct((32, heads + 2 * kv_heads, 128), jnp.bfloat16)
        numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), (5,), ())]
        run = jax.jit(functools.partial(decode_attention, group_size=8))
        traced = run.trace(qkv, rope, prompt, numbers[0], numbers[1], own, numbers[2])
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()

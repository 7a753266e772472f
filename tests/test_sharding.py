"""Eight devices compute what one does, on every mesh axis; the tables refuse unknown names."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import ConfigError, MeshConfig
from jaxgrpo.mesh import (
    Purpose,
    constrain,
    fold_key,
    make_mesh,
    partition_spec,
    shard_rows,
    sharding,
    to_host,
)
from jaxgrpo.model.api import (
    Qwen2Config,
    base_logical_axes,
    completion_logprobs,
    device_plan,
    init_base,
    init_lora,
    lora_logical_axes,
)
from jaxgrpo.rank_plan import RankPlan

CONFIG = Qwen2Config(
    64, 48, 80, num_layers=3, num_heads=4, num_kv_heads=2, tie_word_embeddings=False
)


def _is_axes(x):
    return isinstance(x, tuple)


def test_axes_tables_cover_every_leaf():
    base = init_base(CONFIG, jax.random.key(0))
    axes = base_logical_axes(CONFIG)
    jax.tree.map(lambda a, x: chex.assert_rank(x, len(a)), axes, base, is_leaf=_is_axes)
    plan = RankPlan({"q_proj": np.array([1, 2, 3])}, 4, 8.0, "constant", 4)
    lora = init_lora(CONFIG, plan, jax.random.key(0))
    axes = lora_logical_axes(plan.modules)
    jax.tree.map(lambda a, x: chex.assert_rank(x, len(a)), axes, lora, is_leaf=_is_axes)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 2, 4)])
def test_eight_devices_equal_one(sizes):
    base = init_base(CONFIG, jax.random.key(0))
    plan = RankPlan(
        {"q_proj": np.array([1, 2, 3]), "down_proj": np.array([4, 0, 2])}, 4, 8.0, "rslora", 4
    )
    lora = init_lora(CONFIG, plan, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), lora)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
    prompt_lengths = np.arange(3, 11, dtype=np.int32) % 5 + 2
    completion = np.random.default_rng(1).integers(0, 64, (8, 5)).astype(np.int32)

    def loss(lora, base, plan, tokens, prompt_lengths, completion):
        logprobs, entropy = completion_logprobs(
            CONFIG, base, lora, plan, tokens, prompt_lengths, completion,
            temperature=1.0, chunk_tokens=16, remat="full",
        )  # fmt: skip
        return jnp.mean(logprobs), entropy

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    batch = (tokens, prompt_lengths, completion)
    single = to_host(step(lora, base, device_plan(plan), *map(jnp.asarray, batch)))
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        put = lambda axes, x: jax.device_put(x, sharding(mesh, axes))  # noqa: E731
        sharded_base = jax.tree.map(put, base_logical_axes(CONFIG), base, is_leaf=_is_axes)
        sharded_lora = jax.tree.map(put, lora_logical_axes(plan.modules), lora, is_leaf=_is_axes)
        many = to_host(
            step(sharded_lora, sharded_base, device_plan(plan), *shard_rows(mesh, batch))
        )
    chex.assert_trees_all_close(single, many, atol=2e-5, rtol=1e-4)


def test_unknown_axis_is_an_error_even_without_a_mesh():
    with pytest.raises(KeyError):
        constrain(jnp.zeros((2, 2)), "act_bach", None)
    with pytest.raises(ValueError, match="axis names"):
        constrain(jnp.zeros((2, 2)), "act_batch")
    assert partition_spec(("layers", "embed", "mlp")) == jax.P(None, "fsdp", "model")


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (1, 1, 1)])
def test_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ConfigError, match="devices"):
        make_mesh(MeshConfig(*sizes))


def test_keys_differ_between_steps_purposes_and_seeds():
    keys = [
        tuple(jax.random.key_data(fold_key(seed, step, purpose)).tolist())
        for seed in (0, 1)
        for step in range(50)
        for purpose in Purpose
    ]
    assert len(set(keys)) == len(keys)

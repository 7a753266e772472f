"""Packed rows compute what whole rows do, gradients included; bins are full and balanced."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import GrpoConfig, MeshConfig, OptimConfig
from jaxgrpo.grpo.optimizer import make_optimizer
from jaxgrpo.grpo.step import init_train_state, make_gradients, make_logprobs, make_train_step
from jaxgrpo.mesh import make_mesh, replicate, shard_rows, to_host
from jaxgrpo.model import qwen2
from jaxgrpo.model.api import Qwen2Config, completion_logprobs, device_plan, init_base, init_lora
from jaxgrpo.model.attention import causal_attention
from jaxgrpo.model.pack_rows import pack_rows
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.types import TrainBatch
from tests.gradients import assert_gradients_close

CONFIG = Qwen2Config(61, 48, 80, num_layers=3, num_heads=6, num_kv_heads=2)
PROMPTS, GROUP, SLOTS, WIDTH = 8, 3, 7, 5
PLAN = RankPlan(
    {
        "q_proj": np.array([1, 2, 0]),
        "v_proj": np.array([2, 2, 1]),
        "o_proj": np.array([1, 0, 3]),
        "gate_proj": np.array([4, 0, 2]),
        "up_proj": np.array([1, 1, 1]),
        "down_proj": np.array([2, 3, 1]),
    },
    4, 8.0, "rslora", 4,
)  # fmt: skip
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def weights():
    base = init_base(CONFIG, jax.random.key(0))
    base = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), base)
    lora = init_lora(CONFIG, PLAN, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(2), x.shape), lora)
    return base, lora


def make_rows(seed=0):
    rng = np.random.default_rng(seed)
    rows = PROMPTS * GROUP
    prompt_lengths = np.repeat(rng.integers(1, SLOTS + 1, PROMPTS), GROUP).astype(np.int32)
    lengths = rng.integers(1, WIDTH + 1, rows).astype(np.int32)
    prompts = np.repeat(rng.integers(2, 61, (PROMPTS, SLOTS)), GROUP, axis=0)
    completions = rng.integers(2, 61, (rows, WIDTH)) * (np.arange(WIDTH) < lengths[:, None])
    tokens = np.zeros((rows, SLOTS + WIDTH), np.int32)
    for row in range(rows):
        start = prompt_lengths[row]
        tokens[row, :start] = prompts[row, :start]
        tokens[row, start : start + lengths[row]] = completions[row, : lengths[row]]
    return tokens, prompt_lengths, completions.astype(np.int32), lengths


def make_batches(micro_batches, shards, sizes=4):
    """(plain, packed): the same rows in the same order."""
    tokens, prompt_lengths, completions, lengths = make_rows()
    order, packing = pack_rows(
        tokens, prompt_lengths, completions, lengths, group_size=GROUP,
        micro_batches=micro_batches, shards=shards, sizes=sizes,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    mask = (np.arange(WIDTH) < lengths[:, None]).astype(np.float32)
    arrays = {
        "tokens": tokens,
        "prompt_lengths": prompt_lengths,
        "completion_tokens": completions,
        "loss_mask": mask,
        "advantages": rng.normal(size=len(lengths)).astype(np.float32),
        "sampler_logprobs": -rng.exponential(3.0, mask.shape).astype(np.float32) * mask,
    }
    arrays = {name: values[order] for name, values in arrays.items()}
    return TrainBatch(**arrays), TrainBatch(**arrays, packing=packing)


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def make_grpo(micro_batches):
    return GrpoConfig(
        prompts_per_step=PROMPTS, group_size=GROUP, micro_batches=micro_batches,
        logprob_chunk_tokens=16,
    )  # fmt: skip


def gradients_of(weights, batch, remat):
    base, lora = weights
    gradients = make_gradients(
        CONFIG, make_grpo(2), TEMPERATURE, WIDTH, remat, objective="grpo", by_kernels=True
    )
    return jax.jit(gradients)(lora, base, device_plan(PLAN), on_device(batch))


@pytest.fixture(scope="module")
def whole_rows(weights):
    """What unpacked rows give with everything kept and nothing fused."""
    return gradients_of(weights, make_batches(micro_batches=2, shards=1)[0], "none")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("remat", ["full", "products"])
def test_packed_gradients_equal_those_of_whole_rows(weights, whole_rows, monkeypatch, fused, remat):
    """`fused` is what a GPU runs: adapters inside the products, layers written out."""
    plain, packed = make_batches(micro_batches=2, shards=1)
    monkeypatch.setattr(qwen2, "fuse_adapters", lambda: fused)
    monkeypatch.setattr(qwen2, "unroll_layers", lambda remat: fused)
    mask = plain.loss_mask
    want = whole_rows
    for batch in (plain, packed):
        loss, grads, kernel_grads, logprobs, entropy = gradients_of(weights, batch, remat)
        chex.assert_trees_all_close(loss, want[0], rtol=1e-4, atol=1e-6)
        assert_gradients_close(grads, want[1])
        assert_gradients_close(kernel_grads, want[2])
        chex.assert_trees_all_close(logprobs * mask, want[3] * mask, atol=1e-4)
        chex.assert_trees_all_close(entropy * mask, want[4] * mask, atol=1e-4)


def test_eight_devices_compute_packed_rows_as_one_does(weights):
    base, lora = weights
    _, packed = make_batches(micro_batches=2, shards=4)
    step = make_train_step(
        CONFIG, make_grpo(2), TEMPERATURE, WIDTH, "full", make_optimizer(OptimConfig(), 10)
    )
    optimizer = make_optimizer(OptimConfig(), 10)
    state = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
    one = to_host(step(state, base, device_plan(PLAN), on_device(packed))[1])
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        state = init_train_state(replicate(mesh, lora), optimizer)
        rows = shard_rows(mesh, packed)
        many = to_host(step(state, replicate(mesh, base), replicate(mesh, device_plan(PLAN)), rows))
    chex.assert_trees_all_close(many[1], one, rtol=1e-3, atol=1e-5)


def test_log_probs_of_packed_rows(weights):
    base, lora = weights
    plain, packed = (on_device(b) for b in make_batches(micro_batches=4, shards=1))
    rows = (plain.tokens, plain.prompt_lengths, plain.completion_tokens)
    want, _ = completion_logprobs(
        CONFIG, base, lora, device_plan(PLAN), *rows, temperature=TEMPERATURE, chunk_tokens=16,
        remat="none",
    )  # fmt: skip
    score = make_logprobs(CONFIG, TEMPERATURE, 16, "none", 4)
    got = score(base, lora, device_plan(PLAN), *rows, packed.packing)
    chex.assert_trees_all_close(got, want * plain.loss_mask, atol=1e-4)


def test_every_token_is_packed_once_and_bins_are_balanced():
    tokens, prompt_lengths, completions, lengths = make_rows()
    order, packing = pack_rows(
        tokens, prompt_lengths, completions, lengths, group_size=GROUP, micro_batches=2, shards=2,
        sizes=100,
    )  # fmt: skip
    assert sorted(order) == list(range(len(order)))
    used = (packing.source >= 0).sum(axis=1)
    assert used.sum() == prompt_lengths[::GROUP].sum() + lengths.sum()
    assert (packing.scored >= 0).sum() == lengths.sum()
    assert used.max() <= packing.tokens.shape[1] <= used.max() + 4
    assert used.max() - used.min() <= (prompt_lengths + GROUP * WIDTH).max()


def test_groups_that_do_not_divide_are_not_packed():
    tokens, prompt_lengths, completions, lengths = make_rows()
    assert (
        pack_rows(
            tokens, prompt_lengths, completions, lengths, group_size=GROUP, micro_batches=3,
            shards=1, sizes=4,
        )
        is None
    )  # fmt: skip


def _only_rows(x, lengths, rest):
    real = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
    return jnp.where(real[:, :, None, None], x, rest)


@jax.custom_vjp
def attention_of_rows_alone(q, k, v, lengths):
    """As cuDNN's: what is off the rows is not used, and NaN in output and gradients."""
    return _only_rows(causal_attention(q, k, v, None), lengths, jnp.nan)


def _attention_forward(q, k, v, lengths):
    return attention_of_rows_alone(q, k, v, lengths), (q, k, v, lengths)


def _attention_backward(saved, dy):
    *inputs, lengths = saved
    _, back = jax.vjp(lambda q, k, v: causal_attention(q, k, v, None), *inputs)
    grads = back(_only_rows(dy, lengths, 0.0))
    return *(_only_rows(dx, lengths, jnp.nan) for dx in grads), None


attention_of_rows_alone.defvjp(_attention_forward, _attention_backward)


def test_nothing_off_the_rows_is_used(weights, monkeypatch):
    _, packed = make_batches(micro_batches=2, shards=1)
    want = gradients_of(weights, packed, "full")
    monkeypatch.setattr(
        qwen2,
        "causal_attention",
        lambda q, k, v, mask, lengths: attention_of_rows_alone(q, k, v, lengths),
    )
    loss, grads, *_ = gradients_of(weights, packed, "full")
    chex.assert_trees_all_close(loss, want[0], rtol=1e-6)
    assert_gradients_close(grads, want[1])

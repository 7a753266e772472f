"""Packed rows compute what whole rows do, gradients included."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import GrpoConfig, MeshConfig, OptimConfig
from jaxgrpo.devices import ONE_CPU, Device, device_of
from jaxgrpo.grpo.logprobs import make_logprobs
from jaxgrpo.grpo.loss import token_losses, token_weights
from jaxgrpo.grpo.optimizer import Schedule, make_optimizer
from jaxgrpo.grpo.step import StepSettings, init_train_state, make_gradients, make_train_step
from jaxgrpo.mesh import make_mesh, replicate, to_host
from jaxgrpo.model import qwen
from jaxgrpo.model.api import QwenConfig, device_plan, init_base, init_lora
from jaxgrpo.model.attention import causal_attention
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.train_batches import shard_batch
from jaxgrpo.types import Adapters
from tests.gradients import assert_gradients_close
from tests.rows import completion_logprobs, on_device, random_batch, random_rows

CONFIG = QwenConfig(61, 48, 80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8)
# As Qwen3 has it: heads that are more than the hidden size, and norms of their own.
QK_NORM = dataclasses.replace(CONFIG, head_dim=16, qkv_bias=False, qk_norm=True)
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
    return make_weights(CONFIG)


def make_weights(config):
    base = init_base(config, jax.random.key(0))
    base = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), base)
    lora = init_lora(config, PLAN, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(2), x.shape), lora)
    return base, lora


ROWS = random_rows(np.random.default_rng(0), 61, PROMPTS, GROUP, SLOTS, WIDTH)
MASK = ROWS.mask


def make_batch(micro_batches=2, **options):
    return random_batch(ROWS, micro_batches=micro_batches, **options)


GRPO = GrpoConfig(prompts_per_step=PROMPTS, group_size=GROUP, logprob_chunk_tokens=16)
SETTINGS = StepSettings(GRPO, TEMPERATURE, WIDTH, "full")
SCHEDULE = Schedule(jnp.float32(1e-5), jnp.float32(10))


def gradients_of(weights, batch, remat, grpo=GRPO, config=CONFIG):
    base, lora = weights
    settings = StepSettings(grpo, TEMPERATURE, WIDTH, remat, weight_grad_norms=True)
    adapters = Adapters(lora, device_plan(PLAN))
    return jax.jit(make_gradients(config, settings))(base, adapters, on_device(batch))


@pytest.fixture(scope="module")
def whole_rows(weights):
    return from_whole_rows(CONFIG, weights)


def from_whole_rows(config, weights):
    """loss, gradients, log-probs and entropies from rows that each have their prompt."""
    base, lora = weights
    batch, whole = on_device(make_batch()), ROWS.whole

    def loss(lora, kernels):
        layers = {name: {**base["layers"][name], "kernel": kernels[name]} for name in kernels}
        changed = {**base, "layers": base["layers"] | layers}
        logprobs, entropy = completion_logprobs(
            config, changed, Adapters(lora, device_plan(PLAN)), *whole, temperature=TEMPERATURE
        )
        weights = token_weights(GRPO.loss, batch.loss_mask, WIDTH)
        return jnp.sum(weights * token_losses(GRPO, logprobs, batch)), (logprobs, entropy)

    kernels = {name: base["layers"][name]["kernel"] for name in lora}
    differentiated = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, scored), grads = differentiated(lora, kernels)
    return value, *grads, *scored


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("remat", ["none", "full", "products"])
def test_packed_gradients_equal_those_of_whole_rows(weights, whole_rows, platform, remat):
    """A GPU's program, run here: adapters inside the products, layers written out."""
    config = dataclasses.replace(CONFIG, device=Device(platform))
    compare(config, weights, whole_rows, remat)


def test_packed_gradients_through_norms_of_queries_and_keys():
    weights = make_weights(QK_NORM)
    want = from_whole_rows(QK_NORM, weights)
    for platform, remat in (("cpu", "full"), ("gpu", "products")):
        config = dataclasses.replace(QK_NORM, device=Device(platform))
        compare(config, weights, want, remat)


def compare(config, weights, want, remat):
    batch = make_batch()
    assert batch.packing.count > 1
    loss, grads, kernel_grads, logprobs, entropy = gradients_of(
        weights, batch, remat, config=config
    )
    chex.assert_trees_all_close(loss, want[0], rtol=1e-4, atol=1e-6)
    assert_gradients_close(grads, want[1])
    assert_gradients_close(kernel_grads, want[2])
    chex.assert_trees_all_close(logprobs, want[3] * MASK, atol=1e-4)
    chex.assert_trees_all_close(entropy, want[4] * MASK, atol=1e-4)


def test_eight_devices_compute_packed_rows_as_one_does(weights):
    base, lora = weights
    packed = make_batch(micro_batches=2, shards=4)
    optimizer = make_optimizer(OptimConfig())
    step = make_train_step(CONFIG, SETTINGS, optimizer)
    state = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
    one = to_host(step(state, base, device_plan(PLAN), on_device(packed), SCHEDULE)[1])
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    config = dataclasses.replace(CONFIG, device=device_of(mesh))
    step = make_train_step(config, SETTINGS, optimizer)
    with jax.set_mesh(mesh):
        state = init_train_state(replicate(mesh, lora), optimizer)
        rows = shard_batch(mesh, packed)
        frozen, plan = replicate(mesh, base), replicate(mesh, device_plan(PLAN))
        many = to_host(step(state, frozen, plan, rows, SCHEDULE))
    chex.assert_trees_all_close(many[1], one, rtol=1e-3, atol=1e-5)


def test_log_probs_of_packed_rows(weights, whole_rows):
    base, lora = weights
    packed = on_device(make_batch(micro_batches=4))
    score = make_logprobs(CONFIG, TEMPERATURE, 16, "none")
    got = score(base, Adapters(lora, device_plan(PLAN)), packed)
    chex.assert_trees_all_close(got, whole_rows[3] * MASK, atol=1e-4)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_rows_without_advantage_change_no_gradient(weights, loss):
    """Half of the groups flat: left out of the bins or computed, loss and gradient are the same in
    float32: within 1e-6, and 1e-5 of each leaf's largest entry. Both normalisers count them."""
    grpo = dataclasses.replace(GRPO, loss=loss)
    advantages = make_batch().advantages * np.repeat(np.arange(PROMPTS) % 2, GROUP)
    trained = advantages != 0
    everywhere = make_batch(advantages=advantages)
    without = make_batch(advantages=advantages, trained=trained)
    assert (without.packing.member >= 0).sum() == trained.sum() == len(trained) / 2
    assert without.packing.count < everywhere.packing.count
    want, got = (gradients_of(weights, batch, "full", grpo) for batch in (everywhere, without))
    chex.assert_trees_all_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    assert_gradients_close(got[1:3], want[1:3], tolerance=1e-5)
    chex.assert_trees_all_close(got[3], want[3] * trained[:, None], atol=1e-6)
    chex.assert_trees_all_close(got[4], want[4] * trained[:, None], atol=1e-6)


def test_without_any_advantage_nothing_runs_and_nothing_moves(weights):
    base, lora = weights
    rows = len(MASK)
    empty = on_device(make_batch(advantages=np.zeros(rows), trained=np.zeros(rows, bool)))
    assert empty.packing.count == 0
    loss, grads, kernel_grads, *scored = gradients_of(weights, empty, "full")
    for leaf in jax.tree.leaves((loss, grads, kernel_grads, scored)):
        np.testing.assert_array_equal(leaf, 0)
    optimizer = make_optimizer(OptimConfig())
    step = make_train_step(CONFIG, SETTINGS, optimizer)
    state = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
    after, metrics = step(state, base, device_plan(PLAN), empty, SCHEDULE)
    chex.assert_tree_all_finite((after, metrics))
    chex.assert_trees_all_equal(after.lora, lora)
    assert metrics.scalars["grpo/frac_rows_trained"] == metrics.scalars["packing/bins"] == 0
    assert metrics.scalars["packing/padding"] == metrics.scalars["grad_norm"] == 0


def _only_rows(x, lengths, rest):
    real = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
    return jnp.where(real[:, :, None, None], x, rest)


@jax.custom_vjp
def attention_of_rows_alone(q, k, v, lengths):
    """As cuDNN's: what is off the rows is not used, and NaN in output and gradients."""
    return _only_rows(causal_attention(q, k, v, None, None, ONE_CPU), lengths, jnp.nan)


def _attention_forward(q, k, v, lengths):
    return attention_of_rows_alone(q, k, v, lengths), (q, k, v, lengths)


def _attention_backward(saved, dy):
    *inputs, lengths = saved
    _, back = jax.vjp(lambda q, k, v: causal_attention(q, k, v, None, None, ONE_CPU), *inputs)
    grads = back(_only_rows(dy, lengths, 0.0))
    return *(_only_rows(dx, lengths, jnp.nan) for dx in grads), None


attention_of_rows_alone.defvjp(_attention_forward, _attention_backward)


def test_nothing_off_the_rows_is_used(weights, monkeypatch):
    packed = make_batch()
    want = gradients_of(weights, packed, "full")
    monkeypatch.setattr(
        qwen,
        "causal_attention",
        lambda q, k, v, mask, lengths, device: attention_of_rows_alone(q, k, v, lengths),
    )
    loss, grads, *_ = gradients_of(weights, packed, "full")
    chex.assert_trees_all_close(loss, want[0], rtol=1e-6)
    assert_gradients_close(grads, want[1])

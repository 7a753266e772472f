"""Eight devices compute what one does, on every mesh axis; the tables refuse unknown names."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.config import Config, ConfigError, GrpoConfig, MeshConfig, OptimConfig, RolloutConfig
from jaxgrpo.devices import device_of
from jaxgrpo.grpo.optimizer import Schedule, make_optimizer
from jaxgrpo.grpo.step import StepSettings, init_train_state, make_train_step, packing_metrics
from jaxgrpo.mesh import (
    Purpose,
    batch_shards,
    constrain,
    fold_key,
    make_mesh,
    partition_spec,
    replicate,
    shard_rows,
    sharding,
    to_host,
)
from jaxgrpo.model.api import (
    QwenConfig,
    base_logical_axes,
    bin_logprobs,
    device_plan,
    init_base,
    init_lora,
    lora_logical_axes,
    make_decode_weights,
    resharded_bytes,
)
from jaxgrpo.model.bins import completions_from_bins, take_bin
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.train_batches import pack_batch, shard_batch
from jaxgrpo.types import Adapters, PromptBatch
from tests.rows import on_device, random_rows, train_batch

CONFIG = QwenConfig(
    64, 48, 80, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12, tie_word_embeddings=False
)
# As Qwen3 has it: heads that are more than the hidden size, and norms of their own.
QK_NORM = dataclasses.replace(CONFIG, head_dim=24, qkv_bias=False, qk_norm=True)


def config_on(mesh, config=CONFIG):
    return dataclasses.replace(config, device=device_of(mesh))


def _is_axes(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize("config", [CONFIG, QK_NORM])
def test_axes_tables_cover_every_leaf(config):
    base = init_base(config, jax.random.key(0))
    axes = base_logical_axes(config)
    jax.tree.map(lambda a, x: chex.assert_rank(x, len(a)), axes, base, is_leaf=_is_axes)
    plan = RankPlan({"q_proj": np.array([1, 2, 3])}, 4, 8.0, "constant", 4)
    lora = init_lora(CONFIG, plan, jax.random.key(0))
    axes = lora_logical_axes(plan.modules)
    jax.tree.map(lambda a, x: chex.assert_rank(x, len(a)), axes, lora, is_leaf=_is_axes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sizes"),
    [(CONFIG, (1, 2, 4)), (CONFIG, (8, 1, 1)), (CONFIG, (1, 8, 1)), (QK_NORM, (1, 2, 4))],
)
def test_eight_devices_equal_one(model, sizes):
    base = init_base(model, jax.random.key(0))
    plan = RankPlan(
        {"q_proj": np.array([1, 2, 3]), "down_proj": np.array([4, 0, 2])}, 4, 8.0, "rslora", 4
    )
    lora = init_lora(model, plan, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), lora)
    mesh = make_mesh(MeshConfig(*sizes))
    rows = random_rows(np.random.default_rng(0), 64, 8, 1, 7, 5)
    packed = train_batch(rows, shards=batch_shards(mesh), advantages=np.ones(8))
    assert packed.packing.count == 1

    def loss(config, lora, base, plan, packing):
        packing = take_bin(packing, jnp.int32(0))
        logprobs, entropy = (
            completions_from_bins(found, packing, 5)
            for found in bin_logprobs(
                config,
                base,
                Adapters(lora, plan),
                packing,
                temperature=1.0,
                chunk_tokens=16,
                remat="full",
            )
        )
        return jnp.mean(logprobs), entropy

    step = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    single = to_host(step(model, lora, base, device_plan(plan), on_device(packed).packing))
    with jax.set_mesh(mesh):
        put = lambda axes, x: jax.device_put(x, sharding(mesh, axes))  # noqa: E731
        sharded_base = jax.tree.map(put, base_logical_axes(model), base, is_leaf=_is_axes)
        sharded_lora = jax.tree.map(put, lora_logical_axes(plan.modules), lora, is_leaf=_is_axes)
        packing = shard_batch(mesh, packed).packing
        many = to_host(
            step(config_on(mesh, model), sharded_lora, sharded_base, device_plan(plan), packing)
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


GROUP, WIDTH, SLOTS = 2, 8, 6
GRPO = GrpoConfig(prompts_per_step=8, group_size=GROUP, logprob_chunk_tokens=32)
LEARNING_RATE = 1e-2
OPTIMIZER = make_optimizer(OptimConfig(learning_rate=LEARNING_RATE, eps=1e-3))
SCHEDULE = Schedule(jnp.float32(LEARNING_RATE), jnp.float32(10))
RANKS = {"q_proj": [1, 2, 3], "v_proj": [2, 2, 1], "down_proj": [4, 0, 2]}
PLAN = RankPlan({module: np.array(r) for module, r in RANKS.items()}, 4, 8.0, "rslora", 4)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2)]


def place(mesh, axes, tree):
    put = lambda names, x: jax.device_put(x, sharding(mesh, names))  # noqa: E731
    return jax.tree.map(put, axes, tree, is_leaf=_is_axes)


def fresh_state(mesh):
    lora = init_lora(CONFIG, PLAN, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), lora)
    lora = place(mesh, lora_logical_axes(PLAN.modules), lora)
    return init_train_state(lora, OPTIMIZER)


def two_steps(mesh, state=None):
    """Two whole iterations, rollout to update: tokens, losses, norms and the state after each."""
    model = config_on(mesh)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, SLOTS)).astype(np.int32)
    mask = np.arange(SLOTS)[None, :] >= rng.integers(0, SLOTS, 8)[:, None]
    prompts = PromptBatch(tokens * mask, mask, [""] * 8, [""] * 8, list(range(8)))
    rollout = RolloutConfig(max_completion_tokens=WIDTH)
    generate = make_generate(model, rollout, StopRules((0, 1)), GROUP)
    step = make_train_step(model, StepSettings(GRPO, 1.0, WIDTH, "full"), OPTIMIZER)
    found = []
    # Wide enough weights that sampled tokens are not all alike.
    base = jax.tree.map(lambda x: 4 * x, init_base(model, jax.random.key(0)))
    with jax.set_mesh(mesh):
        base = place(mesh, base_logical_axes(model), base)
        plan = replicate(mesh, device_plan(PLAN))
        state = fresh_state(mesh) if state is None else state
        for number in range(2):
            weights = make_decode_weights(model, base, Adapters(state.lora, plan))
            key = fold_key(0, number, Purpose.ROLLOUT)
            host = to_host(generate(weights, *shard_rows(mesh, (prompts.tokens, mask)), key))
            advantages = np.cos(host.tokens.sum(axis=1)).astype(np.float32)
            batch = pack_batch(mesh, GRPO, prompts, host, advantages)
            state, report = step(state, base, plan, batch, SCHEDULE)
            report = to_host(report)
            for name in packing_metrics(batch.packing):  # which go with the number of shards
                del report.scalars[name]
            found.append((host.tokens, host.logprobs, report, to_host(state.lora)))
    return found, state


@pytest.fixture(scope="module")
def one_device():
    return two_steps(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))[0]


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, marks=[] if s == (2, 2, 2) else pytest.mark.slow) for s in MESHES],
    ids=str,
)
def test_whole_iterations_on_a_mesh_equal_those_on_one_device(one_device, sizes):
    """Tokens exactly. A mesh adds float32 numbers in another order: log-probs within 2e-4; losses
    and norms within 2e-5 and 2e-4 of the largest of their leaf, as importance weights are exp of
    differences of log-probs; adapters within a hundredth of a step of the optimizer, whose eps
    keeps it from dividing rounding by rounding."""
    found, _ = two_steps(make_mesh(MeshConfig(*sizes)))
    for one, many in zip(one_device, found, strict=True):
        np.testing.assert_array_equal(one[0], many[0])
        np.testing.assert_allclose(one[1], many[1], atol=2e-4, rtol=0)
        jax.tree.map(close_to_its_size, one[2], many[2])
        chex.assert_trees_all_close(one[3], many[3], atol=0.01 * LEARNING_RATE, rtol=0)


def close_to_its_size(one, many):
    size = np.abs(one).max()
    np.testing.assert_allclose(one, many, atol=2e-4 * size + 2e-5, rtol=0)


@pytest.mark.parametrize(
    ("saved", "restored"),
    [((2, 2, 2), (1, 8, 1)), pytest.param((1, 4, 2), (8, 1, 1), marks=pytest.mark.slow)],
)
def test_a_checkpoint_of_one_mesh_is_restored_on_another(tmp_path, saved, restored):
    first, second = (make_mesh(MeshConfig(*sizes)) for sizes in (saved, restored))
    state = fresh_state(first)
    config = Config(run_dir=str(tmp_path), mesh=MeshConfig(*saved))
    Checkpoints(tmp_path / "checkpoints", 2).save(3, state, config, PLAN)
    there = fresh_state(second)
    there = dataclasses.replace(there, lora=jax.tree.map(jnp.zeros_like, there.lora))
    config = dataclasses.replace(config, mesh=MeshConfig(*restored))
    again = Checkpoints(tmp_path / "checkpoints", 2).restore_latest(there, config, PLAN)
    assert again is not None and again[1] == 3
    chex.assert_trees_all_equal(to_host(state), to_host(again[0]))
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, again[0].lora, there.lora)
    assert all(jax.tree.leaves(same))


def test_the_samplers_weights_are_gathered_over_fsdp_and_their_bytes_are_known():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    base = place(mesh, base_logical_axes(CONFIG), init_base(CONFIG, jax.random.key(0)))
    with jax.set_mesh(mesh):
        weights = make_decode_weights(config_on(mesh), base, None)
        used = {axis for x in jax.tree.leaves(weights) for axis in x.sharding.spec if axis}
        assert used == {"model"}
        # Key and value heads are fewer than a model axis may be long: every device has them all.
        assert weights["layers"][0]["k_proj"].kernel.sharding.is_fully_replicated
    held = [
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        for tree in (base, weights)
    ]
    assert held[1] - held[0] == resharded_bytes(CONFIG, mesh) > 0
    assert resharded_bytes(CONFIG, make_mesh(MeshConfig(4, 1, 2))) == 0

"""The compiled step on a tiny random model: identities, skipping, masking, placement."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxgrpo.ahead.hlo import count
from jaxgrpo.config import ConfigError, GrpoConfig, MeshConfig, OptimConfig
from jaxgrpo.devices import ONE_CPU, Device, device_of
from jaxgrpo.grpo.logprobs import make_logprobs
from jaxgrpo.grpo.optimizer import Schedule, learning_rate_at, make_optimizer
from jaxgrpo.grpo.step import StepSettings, init_train_state, make_train_step, packing_metrics
from jaxgrpo.mesh import batch_shards, make_mesh, replicate, sharding
from jaxgrpo.model.api import (
    QwenConfig,
    base_logical_axes,
    device_plan,
    init_base,
    init_lora,
    lora_logical_axes,
)
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.train_batches import pack_batch, shard_batch
from jaxgrpo.types import Adapters, Rollout, TrainBatch
from tests.compiled import compilations
from tests.rows import Rows, completion_logprobs, make_rows, on_device, random_batch, random_rows

MODEL = QwenConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
PROMPTS, GROUP, SLOTS, WIDTH = 8, 2, 4, 6
TEMPERATURE = 0.7


def make_plan(q_ranks=(3, 1), down_ranks=(0, 2)) -> RankPlan:
    ranks = {"q_proj": np.array(q_ranks), "down_proj": np.array(down_ranks)}
    return RankPlan(ranks, max_rank=3, alpha=6.0, scale_rule="constant", reference_rank=3)


@pytest.fixture(scope="module")
def base():
    return init_base(MODEL, jax.random.key(0))


@pytest.fixture
def lora():
    """Adapters in mid-training: B is not 0, the padding neither."""
    lora = init_lora(MODEL, make_plan(), jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), len(lora)))
    return {
        module: {"a": ab["a"], "b": 0.3 * jax.random.normal(next(keys), ab["b"].shape)}
        for module, ab in lora.items()
    }


@functools.cache
def some_rows() -> Rows:
    rng = np.random.default_rng(0)
    return random_rows(rng, MODEL.vocab_size, PROMPTS, GROUP, SLOTS, WIDTH)


def make_batch(**options: Any) -> TrainBatch:
    """The rows packed, by default into one bin."""
    return on_device(random_batch(some_rows(), **options))


@pytest.fixture(scope="module")
def batch() -> TrainBatch:
    return make_batch()


@functools.cache
def make_step(
    optim: OptimConfig | None = None, device: Device = ONE_CPU, **changes
) -> tuple[Any, Any]:
    grpo = GrpoConfig(logprob_chunk_tokens=16, **changes)
    optimizer = make_optimizer(optim or OptimConfig())
    model = dataclasses.replace(MODEL, device=device)
    settings = StepSettings(grpo, TEMPERATURE, WIDTH, "none")
    return make_train_step(model, settings, optimizer), optimizer


SCHEDULE = Schedule(jnp.float32(1e-2), jnp.float32(10))


def copy(tree):
    """The step donates its state; what a test looks at afterwards is copied before."""
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def run_once(base, lora, batch, plan=None, **changes):
    step, optimizer = make_step(**changes)
    state = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
    return step(state, base, device_plan(plan or make_plan()), batch, SCHEDULE)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_any_number_of_bins_is_one_bin(loss, base, lora, batch):
    """One loss weighted by rows, one by the batch; test_loss.py has the rest per row."""
    moved, whole = run_once(base, lora, batch, loss=loss)
    assert batch.packing.count == 1
    for micro_batches in (3, 16):
        many = make_batch(micro_batches=micro_batches)
        assert many.packing.count > 1
        after, parts = run_once(base, lora, many, loss=loss)
        parts.scalars.update({name: whole.scalars[name] for name in packing_metrics(batch.packing)})
        chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-6)
        # Adam divides by the gradient's own size, so a gradient near 0 shows its rounding.
        chex.assert_trees_all_close(after.lora, moved.lora, atol=1e-4)


def test_another_plan_learning_rate_and_number_of_steps_compile_nothing(base, lora, batch):
    step, optimizer = make_step(group_size=4)  # a configuration that no other test compiles
    state = init_train_state(lora, optimizer)
    plans = [make_plan(), make_plan((0, 3), (3, 3)), make_plan((1, 1), (0, 0))]
    first, *others = [device_plan(plan) for plan in plans]
    schedules = [Schedule(jnp.float32(1e-3), jnp.float32(total)) for total in (7, 1000)]
    with compilations() as compiled:
        state, _ = step(state, base, first, batch, SCHEDULE)
    assert compiled
    with compilations() as compiled:
        for plan, schedule in zip(others, schedules, strict=True):
            state, _ = step(state, base, plan, batch, schedule)
    assert not compiled
    assert step._cache_size() == 1


def test_no_lengths_nor_flat_groups_compile_anything(base, lora):
    """Steps from all ends at once to none at all, every prompt and row as short or as long as it
    may be, and with some, half, or all of the groups flat, after a first step of any kind."""
    step, optimizer = make_step(group_size=GROUP, prompts_per_step=PROMPTS, micro_batches=5)
    grpo = GrpoConfig(group_size=GROUP, prompts_per_step=PROMPTS, micro_batches=5)
    score = make_logprobs(MODEL, TEMPERATURE, 16, "none")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    rng, bins = np.random.default_rng(0), set()
    base, lora, plan = replicate(mesh, (base, lora, device_plan(make_plan())))

    def run(state, rows, flat):
        rollout = Rollout(
            rows.completions, rows.mask > 0, -rows.mask, rows.lengths, np.zeros_like(rows.lengths)
        )
        advantages = np.repeat(rng.random(PROMPTS) >= flat, GROUP) * rng.normal(size=len(rows.mask))
        batch = pack_batch(mesh, grpo, rows.prompts, rollout, advantages)
        score(base, Adapters(state.lora, plan), batch)
        bins.add(int(batch.packing.count))
        return step(state, base, plan, batch, SCHEDULE)[0]

    with jax.set_mesh(mesh):
        state = run(init_train_state(lora, optimizer), some_rows(), flat=0.3)
    with jax.set_mesh(mesh), compilations() as compiled:
        for prompt, length, flat in itertools.product((1, SLOTS), (1, WIDTH), (0, 0.5, 1)):
            asked = [np.ones(prompt, int)] * PROMPTS
            rows = PROMPTS * GROUP
            completions = np.ones((rows, WIDTH), int)
            shaped = make_rows(asked, completions, [length] * rows, GROUP, SLOTS)
            state = run(state, shaped, flat)
    assert not compiled
    assert step._cache_size() == score._cache_size() == 1
    assert min(bins) == 0 and len(bins) > 3, bins
    chex.assert_tree_all_finite(state)


def test_gradient_matches_a_finite_difference_of_the_loss(base, lora, batch):
    """Plain gradient descent at a known rate shows the gradient that the step used."""
    optimizer = optax.sgd(1.0)
    grpo = GrpoConfig(importance_correction="none", num_iterations=2)
    step = make_train_step(MODEL, StepSettings(grpo, TEMPERATURE, WIDTH, "none"), optimizer)
    plan = device_plan(make_plan())
    old = make_logprobs(MODEL, TEMPERATURE, 64, "none")(base, Adapters(lora, plan), batch)
    batch = dataclasses.replace(batch, old_logprobs=old)

    def loss_at(lora) -> float:
        state = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
        return float(step(state, base, plan, batch, SCHEDULE)[1].scalars["loss"])

    state = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
    after, metrics = step(state, base, plan, batch, SCHEDULE)
    direction = jax.tree.map(lambda new, start: start - new, after.lora, lora)
    norm = metrics.scalars["grad_norm"]
    along = [
        jax.tree.map(lambda w, g, e=e: w + e * g / norm, lora, direction) for e in (1e-2, -1e-2)
    ]
    slope = (loss_at(along[0]) - loss_at(along[1])) / 2e-2
    np.testing.assert_allclose(slope, norm, rtol=5e-3)


def test_repeated_updates_on_one_batch_lower_the_loss(base, lora, batch):
    """Inner iterations: the first makes old log-probs of its own, later ones are given them."""
    step, optimizer = make_step(num_iterations=3, importance_correction="none")
    plan = device_plan(make_plan())
    old = make_logprobs(MODEL, TEMPERATURE, 16, "none")(base, Adapters(lora, plan), batch)
    given = dataclasses.replace(batch, old_logprobs=old)
    own, with_old = (
        step(init_train_state(jax.tree.map(jnp.array, lora), optimizer), base, plan, rows, SCHEDULE)
        for rows in (batch, given)
    )
    chex.assert_trees_all_close(own[1], with_old[1], rtol=1e-3, atol=1e-5)
    state, metrics = with_old
    losses = [float(metrics.scalars["loss"])]
    for _ in range(2):
        state, metrics = step(state, base, plan, given, SCHEDULE)
        losses.append(float(metrics.scalars["loss"]))
    assert losses[2] < losses[1] < losses[0], losses
    assert int(state.step) == 3


def test_log_probs_are_the_models_and_without_adapters_the_base_models(base, lora):
    plan, batch = device_plan(make_plan()), make_batch(micro_batches=4)
    assert batch.packing.count > 1
    score = make_logprobs(MODEL, TEMPERATURE, 16, "none")
    for adapters in (Adapters(lora, plan), None):
        expected, _ = completion_logprobs(
            MODEL, base, adapters, *some_rows().whole, temperature=TEMPERATURE
        )
        got = score(base, adapters, batch)
        np.testing.assert_allclose(got, expected * batch.loss_mask, rtol=1e-5, atol=1e-5)
    silent = {m: {"a": ab["a"], "b": jnp.zeros_like(ab["b"])} for m, ab in lora.items()}
    np.testing.assert_allclose(
        score(base, Adapters(silent, plan), batch), score(base, None, batch), atol=1e-6
    )


def test_padding_never_moves_not_even_by_weight_decay(base, lora, batch):
    step, optimizer = make_step(OptimConfig(weight_decay=0.5))
    before, plan = copy(lora), make_plan()
    state = init_train_state(lora, optimizer)
    for _ in range(2):
        state, _ = step(state, base, device_plan(plan), batch, SCHEDULE)
    state, metrics = step(state, base, device_plan(plan), batch, SCHEDULE)
    for module, mask in plan.masks().items():
        for side, used in (("a", mask[:, None, :]), ("b", mask[:, :, None])):
            moved = np.asarray(state.lora[module][side]) != before[module][side]
            used = np.broadcast_to(used, moved.shape) > 0
            assert not moved[~used].any(), (module, side)
            assert moved[used].mean() > 0.99, (module, side)
            norms = np.asarray(metrics.layer_grad_norms["rms"][module][side])
            np.testing.assert_array_equal(norms == 0, plan.ranks[module] == 0)


def test_squares_of_layer_norms_sum_to_the_global_norm_squared(base, lora, batch):
    _, metrics = run_once(base, lora, batch)
    norms = jax.tree.leaves(metrics.layer_grad_norms["l2"])
    total = sum(float(np.sum(np.square(leaf))) for leaf in norms)
    np.testing.assert_allclose(total, float(metrics.scalars["grad_norm"]) ** 2, rtol=1e-5)


@pytest.mark.parametrize("bad", ["advantages", "old_logprobs"])
def test_a_non_finite_update_is_skipped_and_counted(bad, base, lora, batch):
    step, optimizer = make_step(OptimConfig(learning_rate=1e-2, weight_decay=0.1))
    plan = device_plan(make_plan())
    good = dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
    spoilt = getattr(good, bad).at[0].set(jnp.nan if bad == "advantages" else -jnp.inf)
    state, _ = step(init_train_state(lora, optimizer), base, plan, good, SCHEDULE)
    before = copy(state)
    given = dataclasses.replace(good, **{bad: spoilt})
    state, metrics = step(state, base, plan, given, SCHEDULE)
    assert int(state.skipped) == 1
    assert float(metrics.scalars["grpo/skipped_updates"]) == 1
    after = copy(state)
    chex.assert_trees_all_equal(
        (after.lora, after.opt_state, after.step), (before.lora, before.opt_state, before.step)
    )
    state, metrics = step(state, base, plan, good, SCHEDULE)
    assert (int(state.step), int(state.skipped)) == (2, 1)
    chex.assert_tree_all_finite((state, metrics))
    assert not np.array_equal(state.lora["q_proj"]["b"], before.lora["q_proj"]["b"])


def test_learning_rate_in_use_is_reported(base, lora, batch):
    config = OptimConfig(schedule="linear", warmup_steps=2)
    step, optimizer = make_step(config)
    state = init_train_state(lora, optimizer)
    for update in range(4):
        state, metrics = step(state, base, device_plan(make_plan()), batch, SCHEDULE)
        expected = learning_rate_at(config, SCHEDULE, update)
        np.testing.assert_allclose(metrics.scalars["learning_rate"], expected, rtol=1e-6)


def test_greedy_sampling_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"rollout\.temperature must be positive"):
        make_logprobs(MODEL, 0.0, 16, "none")


def place(mesh: Mesh, tree: Any, axes: Any) -> Any:
    """`tree` on the mesh by the logical axis names of its leaves."""
    return jax.tree.map(
        lambda names, leaf: jax.device_put(leaf, sharding(mesh, names)),
        axes,
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_eight_devices_are_one_and_keep_the_state_in_place(base, lora):
    plan = device_plan(make_plan())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2), jax.devices()[:8])
    batch = make_batch(micro_batches=2, shards=batch_shards(mesh))
    expected_state, expected = run_once(base, lora, batch)
    step, optimizer = make_step(device=device_of(mesh))
    with jax.set_mesh(mesh):
        lora = place(mesh, lora, lora_logical_axes(tuple(lora)))
        base = place(mesh, base, base_logical_axes(MODEL))
        plan, rows = replicate(mesh, plan), shard_batch(mesh, batch)
        state = init_train_state(lora, optimizer)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        state, metrics = step(state, base, plan, rows, SCHEDULE)
        chex.assert_trees_all_close(metrics, expected, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(state.lora, expected_state.lora, atol=1e-4)
        with compilations() as compiled:
            state, _ = step(state, base, plan, rows, SCHEDULE)
        assert not compiled
        stayed = jax.tree.map(
            lambda leaf, was: leaf.sharding.is_equivalent_to(was, leaf.ndim), state, before
        )
        assert all(jax.tree.leaves(stayed)), stayed


ARMS_OPTIM = OptimConfig(learning_rate=1.0, max_grad_norm=0.1)


def four_arms(lora, batch):
    """State, plan, batch and schedule of each: two plans, one of them with layers of rank 0,
    another learning rate, other rows, and one whose update is not finite."""
    plans = [make_plan(), make_plan((0, 3), (3, 3)), make_plan(), make_plan()]
    broken = dataclasses.replace(batch, advantages=batch.advantages.at[0].set(np.nan))
    others = np.random.default_rng(5).normal(size=len(batch.advantages)).astype(np.float32)
    batches = [batch, make_batch(advantages=others), batch, broken]
    _, optimizer = make_step(ARMS_OPTIM)

    def fresh(number):
        start = jax.tree.map(lambda x: jnp.array(x) * (1 + 0.1 * number), lora)
        return init_train_state(start, optimizer)

    schedules = tuple(Schedule(jnp.float32(rate), jnp.float32(10)) for rate in (1.0, 1.0, 0.3, 1.0))
    return tuple(map(fresh, range(4))), tuple(map(device_plan, plans)), tuple(batches), schedules


def test_arms_in_one_step_are_updated_as_if_each_were_alone(base, lora, batch):
    """One whose update is not finite is noticed by none of the others."""
    step, _ = make_step(ARMS_OPTIM)
    states, *of_arms = four_arms(lora, batch)
    for _ in range(2):
        states, together = step(states, base, *of_arms)
    assert together.scalars["grpo/skipped_updates"].tolist() == [0, 0, 0, 2]
    for i, (alone, *of_arm) in enumerate(zip(*four_arms(lora, batch), strict=True)):
        for _ in range(2):
            alone, found = step(alone, base, *of_arm)
        mine = (states[i], jax.tree.map(lambda x, i=i: x[i], together))
        chex.assert_trees_all_close(mine, (alone, found), rtol=1e-5, atol=1e-6)
    assert together.scalars["learning_rate"].tolist() == pytest.approx([1.0, 1.0, 0.3, 1.0])


@pytest.fixture(scope="module")
def two():
    """A mesh of two devices that both have all of the weights."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    return make_mesh(MeshConfig(data=2), jax.devices()[:2])


@pytest.mark.parametrize("changes", [{}, {"loss": "dapo"}, {"kl_coef": 0.1}])
def test_rows_split_over_devices_are_those_of_one_device(changes, two, base, lora):
    """And all that devices tell each other of them is told once, whatever the number of bins."""
    options: dict[str, Any] = {"micro_batches": 4, "shards": 2}
    if changes.get("kl_coef"):
        options["ref_logprobs"] = np.full((PROMPTS * GROUP, WIDTH), -3.0, np.float32)
    rows, plan = make_batch(**options), device_plan(make_plan())
    assert rows.packing.count > 1
    one, optimizer = make_step(**changes)
    start = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
    expected = one(start, base, plan, rows, SCHEDULE)
    step, _ = make_step(device=device_of(two), **changes)
    with jax.set_mesh(two):
        fresh = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
        given = (*replicate(two, (fresh, base, plan)), shard_batch(two, rows), SCHEDULE)
        compiled = step.lower(*given).compile()
        found = compiled(*given)
    # The two differ in the order of their sums alone, and Adam divides by the gradient's size.
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(found[0].lora, expected[0].lora, atol=1e-4)
    told = count(compiled.as_text(), two.size).collectives
    gradient = sum(x.nbytes for x in jax.tree.leaves(lora))
    assert told["all-reduce", 2].bytes < gradient + 4 * rows.loss_mask.nbytes


def test_arms_spread_over_devices_are_those_of_one_device(two, base, lora, batch):
    """And all that devices tell each other is what the arms end with."""
    step, _ = make_step(ARMS_OPTIM)
    states, *of_arms = four_arms(lora, batch)
    expected = step(states, base, *of_arms)
    step, _ = make_step(ARMS_OPTIM, device=device_of(two))
    with jax.set_mesh(two):
        states, base, *of_arms = replicate(two, (four_arms(lora, batch)[0], base, *of_arms))
        compiled = step.lower(states, base, *of_arms).compile()
        found = compiled(states, base, *of_arms)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    told = count(compiled.as_text(), two.size).collectives
    assert set(told) == {("all-gather", 2)}
    assert told["all-gather", 2].bytes == sum(x.nbytes for x in jax.tree.leaves(found))


@pytest.mark.parametrize("policy", ["current", "base"])
def test_log_probs_of_arms_spread_over_devices_are_those_of_one_device(
    two, base, lora, batch, policy
):
    states, plans, batches, _ = four_arms(lora, batch)
    policies = tuple(Adapters(x.lora, plan) for x, plan in zip(states, plans, strict=True))
    on_two = dataclasses.replace(MODEL, device=device_of(two))
    found = []
    for model in (MODEL, on_two):
        score = make_logprobs(model, TEMPERATURE, 16, "none")
        arguments = (base, policies if policy == "current" else None, batches)
        if model is MODEL:
            found.append(score(*arguments))
            continue
        with jax.set_mesh(two):
            found.append(score(*replicate(two, arguments)))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)
    assert any(np.abs(x).sum() > 0 for x in found[1])


@pytest.mark.parametrize("form", ["linear", "cosine", "constant"])
def test_the_schedule_of_the_step_is_the_one_of_an_optimizer(base, lora, batch, form):
    """Against optax's AdamW with the same schedule built in: 1e-5 of each value."""
    optim = OptimConfig(weight_decay=0.1, schedule=form, warmup_steps=1)
    built_in = optax.chain(
        optax.clip_by_global_norm(optim.max_grad_norm),
        optax.adamw(
            lambda count: learning_rate_at(optim, SCHEDULE, count),
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        ),
    )
    settings = StepSettings(GrpoConfig(logprob_chunk_tokens=16), TEMPERATURE, WIDTH, "none")
    plan, found = device_plan(make_plan()), []
    for step, optimizer in (
        make_step(optim),
        (make_train_step(MODEL, settings, built_in), built_in),
    ):
        state = init_train_state(jax.tree.map(jnp.array, lora), optimizer)
        for _ in range(3):
            state, _ = step(state, base, plan, batch, SCHEDULE)
        found.append(state.lora)
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-7)

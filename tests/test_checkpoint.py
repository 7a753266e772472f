"""Checkpoints: bit for bit, the newest few, past a damaged one, and only for the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.checkpoint import Checkpoints, read_adapter
from jaxgrpo.config import Config, ConfigError, MeshConfig, OptimConfig
from jaxgrpo.config_files import load_config
from jaxgrpo.grpo.optimizer import Schedule, learning_rate_in, make_optimizer
from jaxgrpo.grpo.step import init_train_state
from jaxgrpo.identity import first_difference
from jaxgrpo.mesh import make_mesh, sharding
from jaxgrpo.model.api import QwenConfig, init_lora, lora_logical_axes
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.records.run_directory import hash_inputs
from jaxgrpo.types import TrainState

MODEL = QwenConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
OPTIMIZER = make_optimizer(OptimConfig())
SCHEDULE = Schedule(jnp.float32(1e-4), jnp.float32(10))
CONFIG = Config()


def make_plan(q_ranks=(3, 1)):
    ranks = {"q_proj": np.array(q_ranks), "down_proj": np.array([0, 2])}
    return RankPlan(ranks, max_rank=3, alpha=6.0, scale_rule="constant", reference_rank=3)


PLAN = make_plan()


def state_after(updates: int) -> TrainState:
    """A state whose moments, counters and learning rate are not those of the start."""
    state = init_train_state(init_lora(MODEL, PLAN, jax.random.key(1)), OPTIMIZER)
    for update in range(updates):
        grads = jax.tree.map(lambda x, u=update: jnp.cos(x * 3 + u), state.lora)
        old = state.opt_state
        changes, opt_state = OPTIMIZER.update(grads, old, state.lora, schedule=SCHEDULE)
        lora = optax.apply_updates(state.lora, changes)
        state = dataclasses.replace(state, lora=lora, opt_state=opt_state, step=state.step + 1)
    return dataclasses.replace(state, skipped=jnp.asarray(2, jnp.int32))


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def restore(path, config=CONFIG, plan=PLAN, fresh=None):
    found = Checkpoints(path, keep=3).restore_latest(fresh or state_after(0), config, plan)
    return None if found is None else found[:2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The checkpoints 1, 2 and 3 of a run; tests copy what they change."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state_after(step), CONFIG, PLAN)
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


def test_the_state_comes_back_bit_for_bit(saved):
    with no_warning():
        state, step = restore(saved)
    expected = state_after(3)
    assert step == 3
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert found.dtype == wanted.dtype
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
    assert int(state.step) == 3 and int(state.skipped) == 2
    chex.assert_trees_all_equal(learning_rate_in(state.opt_state), jnp.float32(1e-4))


def test_values_that_are_not_finite_and_signed_zeros_survive(tmp_path):
    state = state_after(1)
    strange = jnp.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], jnp.float32)
    state.lora["q_proj"]["a"] = state.lora["q_proj"]["a"].at[0, :5, 0].set(strange)
    Checkpoints(tmp_path / "c", keep=1).save(1, state, CONFIG, PLAN)
    back, _ = restore(tmp_path / "c")
    found, wanted = (np.asarray(s.lora["q_proj"]["a"]) for s in (back, state))
    assert found.tobytes() == wanted.tobytes()


def test_the_state_comes_back_on_the_devices_of_the_fresh_one(saved):
    mesh = make_mesh(MeshConfig(2, 4, 1))
    fresh = state_after(0)
    lora = jax.tree.map(
        lambda axes, x: jax.device_put(x, sharding(mesh, axes)),
        lora_logical_axes(PLAN.modules),
        fresh.lora,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state, _ = restore(saved, fresh=dataclasses.replace(fresh, lora=lora))
    for found, placed in zip(jax.tree.leaves(state.lora), jax.tree.leaves(lora), strict=True):
        assert found.sharding == placed.sharding
    chex.assert_trees_all_equal(jax.device_get(state.lora), jax.device_get(state_after(3).lora))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def test_the_newest_few_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state_after(0), CONFIG, PLAN)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3", "4"]


def test_saving_a_step_again_leaves_it_as_it_was(copy):
    Checkpoints(copy, keep=3).save(3, state_after(0), CONFIG, PLAN)
    state, step = restore(copy)
    assert step == 3 and int(state.step) == 3


def truncate_arrays(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])


DAMAGES = {
    "arrays cut short": truncate_arrays,
    "arrays removed": lambda folder: shutil.rmtree(folder / "state"),
    "array metadata removed": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "manifest removed": lambda folder: shutil.rmtree(folder / "manifest"),
    "manifest cut short": lambda folder: (folder / "manifest" / "metadata").write_text('{"next'),
    "everything removed": lambda folder: [shutil.rmtree(p) for p in folder.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_past_a_damaged_checkpoint_the_one_before_is_taken(copy, damage):
    DAMAGES[damage](copy / "3")
    checkpoints = Checkpoints(copy, keep=3)
    with pytest.warns(UserWarning, match=r"checkpoints/3 is damaged and was set aside") as caught:
        state, step, _ = checkpoints.restore_latest(state_after(0), CONFIG, PLAN)
    assert all("\n" not in str(warning.message) for warning in caught)
    assert step == 2
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(state_after(2)))
    assert (copy.parent / "damaged_checkpoint_3").is_dir()
    # Training goes on from 2 and arrives at 3 again.
    checkpoints.save(3, state_after(3), CONFIG, PLAN)
    with no_warning():
        state, step = restore(copy)
    assert step == 3
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(state_after(3)))


def test_when_every_checkpoint_is_damaged_the_run_starts_over(copy):
    for step in (1, 2, 3):
        shutil.rmtree(copy / str(step) / "state")
    with pytest.warns(UserWarning, match="damaged"):
        assert restore(copy) is None


def test_what_a_killed_writer_left_is_not_a_checkpoint(copy):
    shutil.copytree(copy / "3", copy / "4.orbax-checkpoint-tmp-123")
    with no_warning():
        _, step = restore(copy)
    assert step == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed was 0, is 1"),
        ("grpo.group_size=4", "grpo.group_size was 8, is 4"),
        ("optim.learning_rate=0.5", "optim.learning_rate was 0.0001, is 0.5"),
        ("optim.schedule=cosine", "optim.schedule was constant, is cosine"),
        ("lora.alpha=8", "lora.alpha was 32.0, is 8.0"),
        ("lora.target_modules=[q_proj]", "lora.target_modules was"),
        ("data.path=elsewhere", "data.path was embedded, is elsewhere"),
        ("grpo.delta=4", "grpo.delta was None, is 4.0"),
        ("rewards={gsm8k_answer: 1, format: 1}", "rewards.format was None, is 1.0"),
        ("rewards={format: 1}", "rewards.gsm8k_answer was 1.0, is None"),
    ],
)
def test_another_configuration_is_refused_by_its_key(saved, override, message):
    with pytest.raises(ConfigError) as caught:
        restore(saved, load_config([], [override]))
    assert message in str(caught.value)
    assert "another run_dir" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


def as_saved_before(folder, *settings):
    """Takes settings out of a checkpoint, as if it were older than they are."""
    path = folder / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    for name in settings:
        section, key = name.split(".")
        del manifest["config"][section][key]
    del manifest["sha256"], manifest["inputs"]
    path.write_text(json.dumps(manifest | {"sha256": hash_inputs(manifest)}))


def test_a_setting_younger_than_a_run_has_its_default_there(copy):
    as_saved_before(copy / "3", "grpo.importance_cap", "data.max_prompt_tokens")
    with no_warning():
        assert restore(copy)[1] == 3
        assert read_adapter(copy).config == CONFIG
    with pytest.raises(ConfigError, match=r"grpo\.importance_cap was 3\.0, is 4\.0"):
        restore(copy, load_config([], ["grpo.importance_cap=4"]))


def test_a_setting_that_there_is_no_more_is_named(copy):
    path = copy / "3" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["config"]["grpo"]["old_setting"] = 1
    path.write_text(json.dumps(manifest | {"sha256": hash_inputs(manifest)}))
    with pytest.raises(ConfigError, match=r"another version of jaxgrpo: .*grpo\.old_setting"):
        restore(copy)


def test_other_data_and_other_starting_weights_are_refused(tmp_path):
    config = load_config([], ["data.path=rows.jsonl", "lora.adapter=start"])
    made = {"train_prompts": "a", "adapter": "b"}
    Checkpoints(tmp_path / "c", 1, made).save(1, state_after(1), config, PLAN)

    def again(inputs, config=config):
        return Checkpoints(tmp_path / "c", 1, inputs).restore_latest(state_after(0), config, PLAN)

    assert again(made)[1] == 1
    # The same weights are the same start, wherever they lie.
    moved = load_config([], ["data.path=rows.jsonl", "lora.adapter=moved"])
    assert again(made, moved)[1] == 1
    with pytest.raises(ConfigError, match=r"data\.path rows\.jsonl holds other training rows"):
        again(made | {"train_prompts": "c"})
    with pytest.raises(ConfigError, match="start holds other weights"):
        again(made | {"adapter": "c"})
    with pytest.raises(ConfigError, match=r"lora\.adapter was start, is None"):
        again({"train_prompts": "a"}, load_config([], ["data.path=rows.jsonl"]))


def test_both_values_are_seen_however_long_they_are(saved):
    long = "x" * 5000
    with pytest.raises(ConfigError, match=r"was x{159}….*, is None"):
        raise ConfigError(f"{first_difference({'a': long}, {}, '')}")


def test_another_plan_is_refused_by_its_key(saved):
    with pytest.raises(ConfigError, match=r"plan\.ranks\.q_proj was \[3, 1\], is \[3, 2\]"):
        restore(saved, plan=make_plan((3, 2)))
    with pytest.raises(ConfigError, match=r"plan\.alpha was 6\.0, is 7\.0"):
        restore(saved, plan=dataclasses.replace(PLAN, alpha=7.0))


@pytest.mark.parametrize(
    "overrides",
    [
        ["run_dir=elsewhere"],
        ["steps=500"],
        ["eval.every_steps=5", "eval.samples=4", "eval.temperature=1"],
        ["mesh.data=2", "mesh.fsdp=4"],
        ["grpo.micro_batches=2", "grpo.logprob_chunk_tokens=64", "model.remat=full"],
        # The ranks themselves are compared, wherever they were read from.
        ["lora.plan=elsewhere.json"],
        ["checkpoint_every_steps=1", "keep_checkpoints=9", "log_completions_every_steps=0"],
    ],
)
def test_what_does_not_change_the_training_may_differ(saved, overrides):
    with no_warning():
        _, step = restore(saved, load_config([], overrides))
    assert step == 3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_number_of_steps_is_fixed_where_the_schedule_depends_on_it(tmp_path, schedule):
    config = load_config([], [f"optim.schedule={schedule}"])
    Checkpoints(tmp_path / "c", keep=1).save(1, state_after(1), config, PLAN)
    assert restore(tmp_path / "c", config) is not None
    with pytest.raises(ConfigError, match="steps was 80, is 81"):
        restore(tmp_path / "c", dataclasses.replace(config, steps=81))


def test_a_checkpoint_that_cannot_be_written_is_an_os_error_with_its_path(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").write_text("a file where the folder was")
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*c/5"):
        checkpoints.save(5, state_after(0), CONFIG, PLAN)


def test_a_plan_that_moved_is_handed_back(tmp_path):
    moved = make_plan((1, 3))
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    checkpoints.save(1, state_after(1), CONFIG, moved)
    _, _, plan = checkpoints.restore_latest(state_after(0), CONFIG, None)
    assert plan.to_json() == moved.to_json()

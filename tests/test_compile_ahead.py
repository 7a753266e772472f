"""Programs compiled side by side while the weights load are the ones that the run then calls."""

import dataclasses
import functools
import threading

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

from jaxgrpo import session as session_module
from jaxgrpo.compile_ahead import compile_ahead
from jaxgrpo.config import ConfigError
from jaxgrpo.config_files import load_config
from jaxgrpo.evaluate import EvalPlace
from jaxgrpo.evaluate_run import run_eval
from jaxgrpo.grpo.step import init_train_state
from jaxgrpo.iteration import ArmStep, run_step, run_steps
from jaxgrpo.mesh import to_host
from jaxgrpo.programs import make_programs
from jaxgrpo.run import EMBEDDED_CONFIG
from jaxgrpo.session import describe_session
from tests.compiled import compilations
from tests.devices import few_devices

SMALL = ["grpo.prompts_per_step=8", "grpo.group_size=2", "lora.rank=2", "eval.problems=8"]
SMALL += ["rollout.max_completion_tokens=8", "eval.batch_prompts=8"]
SPLIT = ["mesh.data=2", "mesh.fsdp=2", "mesh.model=2"]


class OnlyLowered:
    """A jitted function that may be compiled, but not called."""

    def __init__(self, jitted):
        self.lower = jitted.lower

    def __call__(self, *_):
        raise AssertionError("called with other arguments than it was compiled for")


def describe(mesh, *words):
    config = load_config([EMBEDDED_CONFIG], [*SMALL, *mesh, *words])
    with few_devices(2 ** len(mesh)):
        return describe_session(config)


def only_lowered(programs):
    names = ("generate", "generate_eval", "train_step")
    found = {name: OnlyLowered(getattr(programs, name)) for name in names}
    weights = programs.decode_weights
    weights = functools.partial(OnlyLowered(weights.func), *weights.args)
    return dataclasses.replace(programs, decode_weights=weights, **found)


@pytest.mark.parametrize(
    ("mesh", "kept"),
    [([], True), ([], False), (SPLIT, True)],
    ids=["one device", "nothing on disk", "2 x 2 x 2"],
)
def test_a_run_calls_what_was_compiled_before_its_weights_were_there(tmp_path, request, mesh, kept):
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    request.addfinalizer(lambda: jax.config.update("jax_compilation_cache_dir", before))
    jax.config.update("jax_compilation_cache_dir", str(before or tmp_path) if kept else None)
    session = describe(mesh)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(session.base))
    with jax.set_mesh(session.mesh):
        programs = make_programs(session)
        ahead = compile_ahead(session, only_lowered(programs), evaluates=True)
        session = session.load()
        state = init_train_state(session.init_lora(), programs.optimizer)
        place = EvalPlace(tmp_path, "fresh", 0)
        run_eval(session, ahead, session.init_lora(), place, Console(quiet=True))
        losses = []
        for step in range(2):
            state, result = run_step(session, ahead, state, step)
            losses.append(result.metrics["loss"])
        assert np.isfinite(losses).all()
        if mesh:
            return
        # What it called is what jax compiles by itself.
        other = init_train_state(session.init_lora(), programs.optimizer)
        for step in range(2):
            other, result = run_step(session, programs, other, step)
            assert result.metrics["loss"] == losses[step]
        chex.assert_trees_all_equal(to_host(state.lora), to_host(other.lora))


@pytest.mark.parametrize(
    "mesh", [[], ["mesh.data=2"], SPLIT], ids=["one device", "an arm or two on each", "2 x 2 x 2"]
)
def test_several_arms_too(tmp_path, mesh):
    """Also with a slot that is free, and with the evaluation of one arm."""
    session = describe(mesh)
    place = EvalPlace(tmp_path, "fresh", 0)
    with jax.set_mesh(session.mesh):
        programs = make_programs(session, 3)
        ahead = compile_ahead(session, only_lowered(programs), evaluates=True)
        session = session.load()
        run_eval(session, ahead, session.init_lora(), place, Console(quiet=True))
        config = session.config
        arms = [session.with_config(dataclasses.replace(config, seed=seed)) for seed in (3, 4)]

        def losses(programs):
            states = [init_train_state(arm.init_lora(), programs.optimizer) for arm in arms]
            for step in range(2):
                asked = [ArmStep(*of_arm, step) for of_arm in zip(arms, states, strict=True)]
                outcomes = run_steps(asked, programs)
                states = [state for state, _ in outcomes]
                yield [result.metrics["loss"] for _, result in outcomes]

        found = list(losses(ahead))
        assert np.isfinite(found).all()
        if mesh:
            return
        assert list(losses(programs)) == found
        # What is there already does not compile again.
        with compilations() as compiled:
            again = compile_ahead(session, ahead, evaluates=True)
            assert list(losses(again)) == found
            run_eval(session, again, session.init_lora(), place, Console(quiet=True))
        assert not compiled


def test_supervised_steps_too():
    session = describe([], "objective=sft")
    with jax.set_mesh(session.mesh):
        programs = make_programs(session)
        ahead = compile_ahead(session, only_lowered(programs), evaluates=False)
        state = init_train_state(session.init_lora(), programs.optimizer)
        _, result = run_step(session.load(), ahead, state, 0)
    assert np.isfinite(result.metrics["loss"])


def test_other_arguments_are_compiled_when_they_come():
    session = describe([])
    with jax.set_mesh(session.mesh):
        programs = make_programs(session)
        ahead = compile_ahead(session, programs, evaluates=False)
        session = session.load()
        base = ahead.decode_weights(session.base, session.adapters(session.init_lora()))
        assert len(base["layers"]) == session.model_config.num_layers
        with compilations() as compiled:
            alone = ahead.decode_weights(session.base, None)
        assert compiled and "embed_tokens" in alone


def test_prompts_are_read_while_devices_are_reached(monkeypatch):
    """And what is wrong with the devices is said without waiting for them."""
    read, reached = threading.Event(), threading.Event()
    prompts = session_module.read_prompts

    def reading(*of):
        read.set()
        assert reached.wait(60)
        return prompts(*of)

    def fails(_):
        assert read.wait(60)
        raise ConfigError("no such mesh")

    monkeypatch.setattr(session_module, "read_prompts", reading)
    monkeypatch.setattr(session_module, "make_mesh", fails)
    with pytest.raises(ConfigError, match="no such mesh"):
        describe([])
    reached.set()

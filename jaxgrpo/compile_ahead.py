"""The programs of a run, compiled side by side while the weights load.

jax compiles a function when it is first called, one after the other: sampling, then training. Here
each is lowered for the arguments that it will get and compiled in a thread of its own; a call waits
for its program. What is called with other arguments is compiled then, as by jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxgrpo.ahead.programs import describe_results
from jaxgrpo.grpo.step import init_train_state
from jaxgrpo.mesh import Purpose, fold_key, shard_rows
from jaxgrpo.model.api import make_decode_weights
from jaxgrpo.programs import Programs
from jaxgrpo.session import Session
from jaxgrpo.train_batches import gold_rollout, pack_batch
from jaxgrpo.types import FINISH_LENGTH, Rollout, TrainBatch


def compile_ahead(session: Session, programs: Programs, *, evaluates: bool) -> Programs:
    """The same programs, which compile from now on; the session need not be loaded.

    Args:
        evaluates: whether the run begins with an evaluation; that of a later one would only delay
            the first step.
    """
    pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="compile")
    config = session.config
    state = init_train_state(session.init_lora(), programs.optimizer)
    adapters = session.adapters(state.lora)
    weights = pool.submit(_in_mesh, session, lambda: _decode_weights(session, adapters))

    def sampler(generate: Any, evaluation: bool) -> Any:
        source, prompts = session.train_prompts, config.grpo.prompts_per_step
        if evaluation:
            source, prompts = session.eval_prompts, config.eval.batch_prompts
        tokens = np.zeros((prompts, source.slots), np.int32)
        rows = shard_rows(session.mesh, (tokens, tokens.astype(bool)))
        key = fold_key(config.seed, 0, Purpose.ROLLOUT)

        def build() -> _Built:
            return _build(generate, (weights.result().out, *rows, key))

        return _Ahead(generate, pool.submit(_in_mesh, session, build))

    def train_step() -> Any:
        arguments = (state, session.base, session.device_plan, example_batch(session))
        build = pool.submit(_in_mesh, session, lambda: _build(programs.train_step, arguments))
        return _Ahead(programs.train_step, build)

    found: dict[str, Any] = {"decode_weights": _Ahead(programs.decode_weights, weights)}
    if config.objective == "grpo":
        found["generate"] = sampler(programs.generate, evaluation=False)
    # Beside the log-probs of other policies a batch is placed as their programs leave them.
    if config.grpo.num_iterations == 1 and config.grpo.kl_coef == 0:
        found["train_step"] = train_step()
    if evaluates:
        found["generate_eval"] = sampler(programs.generate_eval, evaluation=True)
    pool.shutdown(wait=False)
    return dataclasses.replace(programs, **found)


def example_batch(session: Session) -> TrainBatch:
    """A step's batch in its shapes and places; what it holds means nothing."""
    config = session.config
    if config.objective == "sft":
        prompts, rollout = gold_rollout(session, 0)
    else:
        prompts = session.train_prompts.batch(config.seed, 0, config.grpo.prompts_per_step)
        rollout = _empty_rollout(config.grpo.rows_per_step, config.rollout.max_completion_tokens)
    advantages = np.zeros(len(rollout.lengths), np.float32)
    return pack_batch(session.mesh, config.grpo, prompts, rollout, advantages, config.objective)


def _empty_rollout(rows: int, width: int) -> Rollout:
    """On the host, with the types of a real one."""
    whole: Any = np.zeros((rows, width), np.int32)
    return Rollout(
        tokens=whole,
        logprobs=whole.astype(np.float32),
        mask=whole.astype(bool),
        lengths=np.zeros(rows, np.int32),  # type: ignore[arg-type]
        finish_reasons=np.full(rows, FINISH_LENGTH, np.int32),  # type: ignore[arg-type]
    )


@dataclasses.dataclass(frozen=True)
class _Built:
    """A compiled program, what it takes, and where its results lie."""

    program: Any
    takes: Any
    out: Any


def _build(jitted: Any, arguments: tuple, statics: tuple = ()) -> _Built:
    takes = jax.tree.map(_describe, arguments)
    lowered = jitted.lower(*statics, *takes)
    compiled = lowered.compile()
    return _Built(compiled, takes, describe_results(lowered, compiled))


def _decode_weights(session: Session, adapters: Any) -> _Built:
    return _build(make_decode_weights, (session.base, adapters), (session.model_config,))


def _in_mesh(session: Session, build: Callable[[], _Built]) -> _Built:
    """The mesh that surrounds a program belongs to the thread that traces it."""
    with jax.set_mesh(session.mesh):
        return build()


def _describe(x: Any) -> jax.ShapeDtypeStruct:
    # What no device was asked for goes wherever the rest is.
    placed = getattr(x, "committed", True)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if placed else None)


class _Ahead:
    """A jitted function one program of which is compiled, or is being compiled, elsewhere."""

    def __init__(self, jitted: Any, building: Future) -> None:
        self._jitted, self._building = jitted, building

    def __call__(self, *arguments: Any) -> Any:
        built = self._building.result()
        if _fits(arguments, built.takes):
            return built.program(*arguments)
        return self._jitted(*arguments)


def _fits(arguments: tuple, takes: Any) -> bool:
    """Whether arguments have the shapes, types and places that a program was compiled for."""
    given, form = jax.tree.flatten(arguments)
    known, known_form = jax.tree.flatten(takes)
    return form == known_form and all(map(_same, given, known))


def _same(x: Any, takes: jax.ShapeDtypeStruct) -> bool:
    if x.shape != takes.shape or x.dtype != takes.dtype:
        return False
    if takes.sharding is None or not getattr(x, "committed", False):
        return True
    return x.sharding.is_equivalent_to(takes.sharding, len(x.shape))

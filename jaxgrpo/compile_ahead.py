"""The programs of a run, compiled side by side while the weights load.

jax compiles a function when it is first called, one after the other: sampling, then training. Here
each is lowered for the arguments that it will get and compiled in a thread of its own; a call waits
for its program. What is called with other arguments is compiled then, as by jax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrpo.ahead.programs import describe_results, describe_state
from jaxgrpo.grpo.optimizer import Schedule
from jaxgrpo.mesh import Purpose, fold_key, shard_rows
from jaxgrpo.programs import Programs
from jaxgrpo.session import Session
from jaxgrpo.start_phases import phase_done
from jaxgrpo.train_batches import gold_rollout, pack_batch
from jaxgrpo.types import FINISH_LENGTH, Rollout, TrainBatch


def compile_ahead(
    session: Session, programs: Programs, *, evaluates: bool, track_sensitivity: bool = False
) -> Programs:
    """The same programs, which compile from now on; the session need not be loaded.

    Args:
        session: of several arms, any one's.
        programs: what some of them compiled ahead before, for other arms, they keep.
        evaluates: whether the run begins with an evaluation; that of a later one would only delay
            the first step.
        track_sensitivity: as of `loop.start_run`.
    """
    # With programs on the disk it is lowering that takes long, Python's work, which threads do not
    # share: one program after the other, as the run calls them, but the train step, which takes the
    # longest to read, before the sampler. Without, the longest compilation has to begin early; and
    # on a mesh what is compiled says how its results lie. There a thread compiles what it has
    # lowered.
    kept = jax.config.jax_compilation_cache_dir is not None  # type: ignore[attr-defined]
    in_order = kept and session.mesh.size == 1
    lowering = ThreadPoolExecutor(1 if in_order else 4, thread_name_prefix="compile")
    compiling = ThreadPoolExecutor(4, thread_name_prefix="compile") if in_order else None
    config, arms = session.config, programs.arms
    state = describe_state(
        session.model_config, session.plan, session.mesh, programs.optimizer, track_sensitivity
    )
    adapters = session.adapters(state.lora)

    def start(name: str, function: Any, arguments: Callable[[], tuple]) -> Future:
        def build() -> _Built:
            # The mesh that surrounds a program belongs to the thread that traces it.
            with jax.set_mesh(session.mesh):
                built = _build(function, arguments(), compiling)
            built.program.add_done_callback(lambda _: phase_done(name))
            return built

        return lowering.submit(build)

    def decode_weights(adapters: Any) -> Future:
        return start("sampler_weights", programs.decode_weights, lambda: (session.base, adapters))

    def sampler(generate: Any, evaluation: bool, weights: Future) -> Any:
        rows = example_prompts(session, 1 if evaluation else arms, evaluation)
        name = "eval_sampler" if evaluation else "sampler"
        return _ahead(generate, start(name, generate, lambda: (weights.result().out, *rows)))

    def train_step() -> Any:
        batch, schedule = example_batch(session, arms), Schedule.of(config)
        of_arms: Any = (state, session.device_plan, batch, schedule)
        if arms > 1:
            of_arms = tuple((x,) * arms for x in of_arms)
        states, *others = of_arms
        arguments = (states, session.base, *others)
        return _ahead(
            programs.train_step, start("train_step", programs.train_step, lambda: arguments)
        )

    weights = decode_weights(adapters if arms == 1 else (adapters,) * arms)
    # Evaluations are of one arm, however many are trained together.
    of_one = decode_weights(adapters) if evaluates and arms > 1 else weights
    both = dict.fromkeys((weights, of_one))
    found: dict[str, Any] = {"decode_weights": _ahead(programs.decode_weights, *both)}
    if evaluates:
        found["generate_eval"] = sampler(programs.generate_eval, True, of_one)
    # Beside the log-probs of other policies a batch is placed as their programs leave them.
    if config.grpo.num_iterations == 1 and config.grpo.kl_coef == 0:
        found["train_step"] = train_step()
    if config.objective == "grpo":
        found["generate"] = sampler(programs.generate, False, weights)
    if compiling is not None:
        lowering.submit(compiling.shutdown, wait=False)
    lowering.shutdown(wait=False)
    return dataclasses.replace(programs, **found)


def example_prompts(session: Session, arms: int, evaluation: bool) -> tuple:
    """What a sampler takes beside the weights, in its shapes and places."""
    config = session.config
    source, prompts = session.train_prompts, config.grpo.prompts_per_step
    if evaluation:
        source, prompts = session.eval_prompts, config.eval.batch_prompts
    tokens = np.zeros((arms * prompts, source.slots), np.int32)
    rows = shard_rows(session.mesh, (tokens, tokens.astype(bool)))
    key = fold_key(config.seed, 0, Purpose.ROLLOUT)
    if arms == 1:
        return (*rows, key)
    caps = np.zeros(arms * config.grpo.rows_per_step, np.int32)
    return (*rows, jnp.stack([key] * arms), shard_rows(session.mesh, caps))


def example_batch(session: Session, arms: int) -> TrainBatch:
    """A step's batch, of one of so many arms, in its shapes and places; what it holds means
    nothing."""
    config = session.config
    if config.objective == "sft":
        prompts, rollout = gold_rollout(session, 0)
    else:
        prompts = session.train_prompts.batch(config.seed, 0, config.grpo.prompts_per_step)
        rollout = _empty_rollout(config.grpo.rows_per_step, config.rollout.max_completion_tokens)
    advantages = np.zeros(len(rollout.lengths), np.float32)
    return pack_batch(
        session.mesh,
        config.grpo,
        prompts,
        rollout,
        advantages,
        config.objective,
        whole=session.model_config.device.arm_shards(arms) > 1,
    )


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
    """A program, compiled or being compiled, what it takes, and where its results lie."""

    program: Future
    takes: Any
    out: Any


def _build(function: Any, arguments: tuple, compiling: Executor | None) -> _Built:
    """Lowered here, and compiled by `compiling`, for one device; None: compiled here too."""
    takes, statics = jax.tree.map(_describe, arguments), ()
    if isinstance(function, _Ahead):
        if (known := function.find(takes)) is not None:
            return known
        function = function.function
    if isinstance(function, functools.partial):
        function, statics = function.func, function.args
    lowered = function.lower(*statics, *takes)
    if compiling is not None:
        whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        out = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), lowered.out_info
        )
        return _Built(compiling.submit(lowered.compile), takes, out)
    compiled: Future = Future()
    compiled.set_result(lowered.compile())
    return _Built(compiled, takes, describe_results(lowered, compiled.result()))


def _describe(x: Any) -> jax.ShapeDtypeStruct:
    # What no device was asked for goes wherever the rest is.
    placed = getattr(x, "committed", True)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if placed else None)


def _ahead(function: Any, *building: Future) -> _Ahead:
    """With what the function has compiled ahead already."""
    if isinstance(function, _Ahead):
        return _Ahead(function.function, (*function.building, *building))
    return _Ahead(function, building)


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """A jitted function some programs of which are compiled, or are being compiled, elsewhere."""

    function: Any
    building: tuple[Future, ...]

    def __call__(self, *arguments: Any) -> Any:
        built = self.find(arguments)
        return (self.function if built is None else built.program.result())(*arguments)

    def find(self, arguments: tuple) -> _Built | None:
        """The program for such arguments, once it is lowered."""
        found = (building.result() for building in self.building)
        return next((built for built in found if _fits(arguments, built.takes)), None)


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

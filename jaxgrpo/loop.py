"""One run: its steps with their evaluations, checkpoints and records.

A run is a generator that asks for its steps, so that several runs can take theirs together.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import jax
from rich.console import Console

from jaxgrpo import __version__
from jaxgrpo.checkpoint import Checkpoints, numbered
from jaxgrpo.compiles import Compiled, compiled, longest
from jaxgrpo.config import ConfigError
from jaxgrpo.config_files import dump_config, encode_config, flat_settings
from jaxgrpo.devices import peak_memory
from jaxgrpo.divergence import DivergenceGuard
from jaxgrpo.evaluate import EvalPlace, EvalResult, StoppedError, evaluation_inputs, read_eval
from jaxgrpo.evaluate_run import run_eval, start_policy
from jaxgrpo.grpo.step import init_train_state
from jaxgrpo.iteration import ArmStep
from jaxgrpo.mesh import to_host
from jaxgrpo.model.adapters import save_adapter
from jaxgrpo.processes import any_process, check_agreement, check_shared, first_process
from jaxgrpo.programs import Programs
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.records.metrics import MetricWriter, completions_table
from jaxgrpo.records.model_card import CardFacts, scores_of, write_card
from jaxgrpo.records.progress import ProgressBar
from jaxgrpo.records.run_directory import RunDirectory, atomic_write_json, atomic_write_text
from jaxgrpo.session import Session
from jaxgrpo.start_phases import phase_done, start_record
from jaxgrpo.step_records import StepResult
from jaxgrpo.types import TrainState, Tree


@dataclass(frozen=True)
class TrainResult:
    """What a run found."""

    before: EvalResult | None
    after: EvalResult | None
    run: RunDirectory
    metrics: dict[str, float]
    interrupted: bool


Replan = Callable[[int, TrainState, RankPlan], tuple[TrainState, RankPlan] | None]
"""(steps done, state, plan) -> the state and plan to go on with, or None to keep both. It may
depend on nothing else but the run's own files, so that a resumed run decides the same."""


Taken = tuple[TrainState, StepResult]

Run = Generator[ArmStep, Taken, TrainResult]
"""A run as a generator: it yields the steps that it wants to take, and is sent what they came to,
or has the error thrown at it. Whoever drives several takes their steps together."""


def start_run(
    session: Session,
    programs: Programs,
    console: Console,
    stopping: threading.Event,
    *,
    replan: Replan | None = None,
    track_sensitivity: bool = False,
) -> Run:
    """A run from its newest checkpoint, if there is one, to its last step.

    Args:
        stopping: set when the run is to save and end.
        replan: called after every step; None keeps the plan.
        track_sensitivity: keep AdaLoRA's statistics in the state.
    """
    config = session.config
    run = RunDirectory(Path(config.run_dir)).create()
    check_shared(run.root)
    # One lock for the job: its processes are one writer.
    held = run.lock() if first_process() else nullcontext()
    with held, saying_what_is_saved(run):
        fresh = init_train_state(session.init_lora(), programs.optimizer, track_sensitivity)
        inputs = session.inputs
        checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints, inputs)
        fixed = None if replan else session.plan
        restored = checkpoints.restore_latest(fresh, config, fixed)
        start_plan = session.plan
        state, start, plan = restored or (fresh, 0, start_plan)
        if start > config.steps:
            raise ConfigError(
                f"{run.root} is after step {start}, further than steps={config.steps}; give "
                f"steps={start}, or another run_dir"
            )
        if restored is not None:
            console.print(f"resuming {run.root} after step {start} of {config.steps}")
            session = session.with_plan(plan)
        check_agreement("settings", json.dumps(encode_config(config), sort_keys=True))
        check_agreement("data", json.dumps(inputs, sort_keys=True))
        check_agreement("rank plans", json.dumps(plan.to_json(), sort_keys=True))
        check_agreement("checkpoints to go on from", str(start))
        if first_process():
            atomic_write_text(run.config, dump_config(config))
        writer = MetricWriter(run, flat_settings(config))
        writer.rewind(start)
        with writer:
            loop = Loop(
                session, programs, run, checkpoints, writer, console, replan, stopping, start_plan
            )
            return (yield from loop.run_to_end(state, start))


@dataclass
class Loop:
    """The steps of one run, with its evaluations and checkpoints."""

    session: Session
    programs: Programs
    run: RunDirectory
    checkpoints: Checkpoints
    writer: MetricWriter
    console: Console
    replan: Replan | None
    stopping: threading.Event
    start_plan: RankPlan

    def run_to_end(self, state: TrainState, start: int) -> Run:
        """Trains, evaluates and exports; whatever asks it to stop, the state is saved."""
        config, before, done = self.session.config, None, start
        metrics = self.writer.last_step()
        try:
            if config.eval.before_training:
                before = self.evaluate_start(resumed=start > 0)
            if 0 < start < config.steps and self.evaluation_due(start):
                self.evaluate(state.lora, start)  # it was stopped after the checkpoint of this step
            with ProgressBar(config.steps, start, self.console) as bar:
                for step in range(start, config.steps):
                    state, metrics = yield from self.step(state, step, bar)
                    done = step + 1
                    if done < config.steps and self.should_stop():
                        raise StoppedError
                    if done < config.steps and self.evaluation_due(done):
                        self.evaluate(state.lora, done)
            model = str(config.model.path)
            lora = to_host(state.lora)
            if first_process():
                save_adapter(self.run.adapter, lora, self.session.plan, model)
            after = self.evaluate(state.lora, done) if config.eval.after_training else None
        except StoppedError:
            if done > start:
                self.checkpoints.save(done, state, config, self.session.plan)
            return TrainResult(before, None, self.run, metrics, interrupted=True)
        except ConfigError:
            # A reward that failed in an evaluation must not cost the steps before it.
            # Of several processes the others may not be there to save with.
            if done > start and jax.process_count() == 1:
                self.checkpoints.save(done, state, config, self.session.plan)
            raise
        result = TrainResult(before, after, self.run, metrics, interrupted=False)
        if result.after is not None:
            self.writer.write_result(done, result.after.metrics)
        if first_process():
            self.write_card(result)
            atomic_write_json(
                self.run.summary,
                {
                    **summary(self.session, result, self.start_plan),
                    "compiled": self.compile_record(),
                    "start": start_record(),
                },
            )
        return result

    def should_stop(self) -> bool:
        """Whether any process of the job was asked to stop; then all of them do, at one step."""
        return any_process(self.stopping.is_set())

    def step(
        self, state: TrainState, step: int, bar: ProgressBar
    ) -> Generator[ArmStep, Taken, tuple[TrainState, dict[str, float]]]:
        """One step with what it writes: metrics, completions, a checkpoint when one is due."""
        config, done = self.session.config, step + 1
        # Of the first step all since the process began: its programs compile before it.
        before = compiled() if self.compiled_by_step else Compiled()
        try:
            state, result = yield ArmStep(
                self.session, state, step, lambda phase: bar.at(phase, step)
            )
        except Exception:
            # A reward that raised, say, must not cost the steps since the last checkpoint.
            # Of several processes the others may not be there to save with.
            alone = jax.process_count() == 1
            if step and alone and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                self.checkpoints.save(step, state, config, self.session.plan)
            raise
        phase_done("first_step")
        new = compiled().since(before)
        self.compiled_by_step |= {done: new} if new.programs else {}
        result.metrics["time/programs_compiled"] = float(new.programs)
        result.metrics["time/programs_from_disk"] = float(new.from_disk)
        result.metrics["time/compile_s"] = new.seconds
        self.writer.write(done, result.metrics, result.layer_grad_norms)
        self.writer.write_completions(done, result.completions)
        bar.after(done, result.metrics)
        every = config.log_completions_every_steps
        if every and (done % every == 0 or done == 1):
            self.writer.write_samples(done, result.layer_grad_norms, result.completions)
            if result.completions:
                bar.print(completions_table(done, result.completions))
        bad = self.guard.check(done, result, self.console)
        if self.replan and (moved := self.replan(done, state, self.session.plan)):
            state, self.session = moved[0], self.session.with_plan(moved[1])
        due = done % config.checkpoint_every_steps == 0 and not bad
        if due or done == config.steps:
            self.checkpoints.save(done, state, config, self.session.plan)
        return state, result.metrics

    def __post_init__(self) -> None:
        self.guard = DivergenceGuard(self.run)
        self.compiled_by_step: dict[int, Compiled] = {}

    def write_card(self, result: TrainResult) -> None:
        """The adapter's README.md."""
        config, plan = self.session.config, self.session.plan
        scores = {"before": result.before, "after": result.after}
        facts = CardFacts(
            "peft",
            str(config.model.path),
            "python -m jaxgrpo.run train settings.yaml",
            config=encode_config(config),
            step=config.steps,
            plan=plan,
            parameters=plan.trainable_parameters(self.session.model_config.module_shapes),
            scores=scores_of({name: r and r.metrics for name, r in scores.items()}),
        )
        write_card(self.run.adapter, facts)

    def compile_record(self) -> dict:
        """What this process compiled: in which steps, and all told (evaluations included)."""
        total = compiled()
        steps = {str(step): asdict(found) for step, found in self.compiled_by_step.items()}
        return asdict(total) | {"longest": longest(), "by_step": steps}

    def evaluation_due(self, done: int) -> bool:
        every = self.session.config.eval.every_steps
        return bool(every) and done % every == 0

    def evaluate_start(self, resumed: bool) -> EvalResult:
        """Of what training starts from; a resumed run has it already, if it was made so."""
        session, policy = self.session, start_policy(self.session)
        known = read_eval(self.run.eval, 0) if resumed else None
        if known and known.made_with == evaluation_inputs(
            session.config, session.eval_prompts, policy
        ):
            return known
        # Fresh adapters are the base model, in the program that every later evaluation runs.
        return self.evaluate(session.init_lora(), 0, policy)

    def evaluate(self, lora: Tree | None, step: int, policy: str | None = None) -> EvalResult:
        place = EvalPlace(self.run.eval, policy or f"step {step}", step)
        result = run_eval(self.session, self.programs, lora, place, self.console, self.should_stop)
        self.writer.write(step, result.metrics)
        return result


@contextmanager
def saying_what_is_saved(run: RunDirectory) -> Iterator[None]:
    """Adds to a disk's error (full, read-only) up to which step the run is safe."""
    try:
        yield
    except OSError as error:
        steps = numbered(run.checkpoints)
        saved = f"saved up to step {steps[0]}" if steps else "nothing is saved yet"
        raise OSError(f"{error}; {saved}: mend it and run the same command again") from error


def summary(session: Session, result: TrainResult, start_plan: RankPlan) -> dict:
    """What summary.json holds."""
    model, plan = session.model_config, session.plan
    return {
        "model": {
            "layers": model.num_layers,
            "parameters": model.num_parameters,
            "module_shapes": model.module_shapes,
            "dtype": model.dtype,
        },
        "plan": plan.to_json(),
        "start_ranks": start_plan.to_json()["ranks"],
        "prompts": session.prompt_hashes,
        "trainable_parameters": plan.trainable_parameters(model.module_shapes),
        "eval_before": None if result.before is None else result.before.metrics,
        "eval_after": None if result.after is None else result.after.metrics,
        "last_step": result.metrics,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {
            name: version(name)
            for name in ("jax", "flax", "optax", "orbax-checkpoint", "transformers")
        }
        | {"jaxgrpo": __version__}
        | {"device": jax.devices()[0].device_kind},
    }


def peak_memory_bytes() -> int | None:
    """The device's peak, or the process' where the backend (CPU) does not say."""
    peak = peak_memory()
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

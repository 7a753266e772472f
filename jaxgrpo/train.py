"""Training: one run, or several arms whose steps are taken together."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.compile_ahead import compile_ahead
from jaxgrpo.config import Config
from jaxgrpo.iteration import ArmStep, run_steps
from jaxgrpo.loop import Replan, Run, TrainResult, start_run
from jaxgrpo.processes import first_process
from jaxgrpo.programs import Programs, make_programs
from jaxgrpo.records.run_directory import DivergedError, RunDirectory
from jaxgrpo.session import Session, describe_session, warn_user
from jaxgrpo.start_phases import phase_done


def train(config: Config, console: Console) -> TrainResult:
    """Runs the configuration to its last step, from its newest checkpoint if there is one.

    Raises:
        ConfigError: before anything is written, if the configuration cannot run.
    """
    phase_done("imports")
    session = describe_session(config)
    phase_done("prompts")
    check_startable(session)
    warn_user(config, session, console)
    # While programs are traced the collector would look hundreds of times through what is there.
    gc.freeze()
    try:
        with jax.set_mesh(session.mesh):
            evaluates = config.eval.before_training
            programs = compile_ahead(session, make_programs(session), evaluates=evaluates)
            return train_session(session.load(console), programs, console)
    finally:
        gc.unfreeze()


def check_startable(session: Session) -> None:
    """Raises what `start_run` would of a run directory that another process writes or that holds
    another run, before anything is loaded or compiled."""
    run = RunDirectory(Path(session.config.run_dir))
    if first_process() and run.root.is_dir():
        with run.lock():
            checkpoints = Checkpoints(
                run.checkpoints, session.config.keep_checkpoints, session.inputs
            )
            checkpoints.check_resumable(session.config, session.plan)


def train_session(
    session: Session,
    programs: Programs,
    console: Console,
    *,
    replan: Replan | None = None,
    track_sensitivity: bool = False,
) -> TrainResult:
    """`train` of an open session, with programs that sessions of the same shapes may share; the
    other arguments as of `start_run`."""
    with stop_requested() as stopping:
        run = start_run(
            session,
            programs,
            console,
            stopping,
            replan=replan,
            track_sensitivity=track_sensitivity,
        )
        (result,) = drive([run], programs)
    if isinstance(result, Exception):
        raise result
    return result


def train_arms(
    sessions: Sequence[Session],
    programs: Programs,
    console: Console,
    *,
    replans: Sequence[Replan | None] = (),
    track_sensitivity: bool = False,
) -> list[TrainResult | Exception]:
    """`train_session` of several arms in the same programs, each as if it were alone: what one
    ends with, an error of its own included, does not touch the others. Of several processes, an
    error other than divergence ends the job.

    Args:
        sessions: at most `programs.arms`, that differ in seed, plan, scale rule, learning rate and
            run_dir alone.
        console: shows the progress of the first.
        replans: of each what moves its ranks (`start_run`); none stands for none of any.
        track_sensitivity: of all of them, as of `start_run`.
    """
    quiet = Console(quiet=True)
    with stop_requested() as stopping:
        runs = [
            start_run(
                session,
                programs,
                quiet if number else console,
                stopping,
                replan=replans[number] if replans else None,
                track_sensitivity=track_sensitivity,
            )
            for number, session in enumerate(sessions)
        ]
        return drive(runs, programs)


def drive(runs: Sequence[Run], programs: Programs) -> list[TrainResult | Exception]:
    """Takes the steps that runs ask for, those of all that have not ended together."""
    asked: dict[int, ArmStep] = {}
    ended: dict[int, TrainResult | Exception] = {}

    def go_on(number: int, send: Any) -> None:
        asked.pop(number, None)
        run = runs[number]
        try:
            asked[number] = run.throw(send) if isinstance(send, Exception) else run.send(send)
        except StopIteration as end:
            ended[number] = end.value
        except Exception as error:
            # Other processes may not know of it, and would wait for this arm.
            if jax.process_count() > 1 and not isinstance(error, DivergedError):
                raise
            ended[number] = error

    for number in range(len(runs)):
        go_on(number, None)
    while asked:
        numbers = list(asked)
        try:
            outcomes: Sequence[Any] = run_steps(list(asked.values()), programs)
        except Exception as error:
            outcomes = [error] * len(numbers)
        for number, outcome in zip(numbers, outcomes, strict=True):
            go_on(number, outcome)
    return [ended[number] for number in range(len(runs))]


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Set by SIGINT or SIGTERM: the step in progress is finished and saved. A second one kills.

    SIGINT that was inherited as ignored, as a script's background job has it, stays ignored.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals = [number for number, known in previous.items() if known is not signal.SIG_IGN]

    def handle(number: int, _: Any) -> None:
        event.set()
        signal.signal(number, previous[signal.Signals(number)])

    for known in signals:
        signal.signal(known, handle)
    try:
        yield event
    finally:
        for known in signals:
            signal.signal(known, previous[known])

"""Evaluations of a run: of a step of it, of what it starts from, of its newest checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jax
from rich.console import Console

from jaxgrpo.checkpoint import check_same_policy, read_adapter
from jaxgrpo.config import Config
from jaxgrpo.evaluate import EvalPlace, EvalResult, EvalTask, evaluate, evaluation_inputs
from jaxgrpo.model.weights import weights_sha256
from jaxgrpo.processes import check_shared, first_process
from jaxgrpo.programs import Programs, make_programs
from jaxgrpo.records.run_directory import RunDirectory, hash_inputs
from jaxgrpo.session import Session, open_session
from jaxgrpo.types import Tree


def run_eval(
    session: Session,
    programs: Programs,
    lora: Tree | None,
    place: EvalPlace,
    console: Console,
    stopping: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Evaluates a policy; lora None means the base model.

    With `eval.also_greedy` also greedily, as `eval/greedy_...` beside the sampled metrics.
    """
    config = session.config
    adapters = None if lora is None else session.adapters(lora)
    weights = programs.decode_weights(session.base, adapters)
    task = EvalTask(
        config, session.eval_prompts, session.tokenizer, session.eval_reward, session.mesh
    )
    result = evaluate(programs.generate_eval, weights, task, place, console, stopping)
    if not config.eval.also_greedy:
        return result
    settings = dataclasses.replace(config.eval, samples=1, temperature=0.0, also_greedy=False)
    task = dataclasses.replace(task, config=dataclasses.replace(config, eval=settings))
    place = dataclasses.replace(place, name="greedy")
    greedy = evaluate(programs.generate_greedy, weights, task, place, console, stopping)
    beside = {k.replace("eval/", "eval/greedy_"): v for k, v in greedy.metrics.items()}
    return dataclasses.replace(result, metrics=result.metrics | beside)


def start_policy(session: Session) -> str:
    """What training starts from, by name and content."""
    if session.adapter is None:
        return f"the base model (sha256 {weights_sha256(session.model_dir)[:12]})"
    return f"lora.adapter {session.config.lora.adapter} (sha256 {session.adapter.sha256()[:12]})"


def evaluate_run(config: Config, console: Console) -> tuple[EvalResult, Path]:
    """Evaluates the newest checkpoint of `run_dir`; without one, `lora.adapter` or the base model.

    The records lie in a folder of their own per policy and settings, also returned: what the run
    or a study wrote by itself stays as it is.

    Raises:
        ConfigError: the checkpoint belongs to another model, or `lora.adapter` is given beside it.
    """
    session = open_session(config, console)
    run = RunDirectory(Path(config.run_dir)).create()
    check_shared(run.root)
    held = run.lock() if first_process() else nullcontext()
    with held, jax.set_mesh(session.mesh):
        saved = read_adapter(run.checkpoints)
        if saved is not None:
            check_same_policy(saved.config, config, run.root)
            session = session.with_plan(saved.plan)
            lora, step, policy = session.place_lora(saved.lora), saved.step, f"step {saved.step}"
            what = f"{run.root} after step {step}"
        else:
            lora = None if session.adapter is None else session.init_lora()
            step, policy = 0, start_policy(session)
            what = policy if lora is not None else f"{policy}: there is no checkpoint"
        console.print(f"evaluating {what}", highlight=False, soft_wrap=True)
        made_with = evaluation_inputs(config, session.eval_prompts, policy)
        directory = run.evaluations / hash_inputs(made_with)[:8]
        if first_process():
            directory.mkdir(parents=True, exist_ok=True)
        programs = make_programs(session)
        place = EvalPlace(directory, policy, step)
        return run_eval(session, programs, lora, place, console), directory

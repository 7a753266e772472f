"""What runs on the device for a study: one open model, and programs shared by all of its runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from jaxgrpo.checkpoint import read_adapter
from jaxgrpo.compile_ahead import compile_ahead
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import dump_config
from jaxgrpo.evaluate import EvalPlace
from jaxgrpo.evaluate_run import run_eval
from jaxgrpo.iteration import Programs, make_programs
from jaxgrpo.model.adapters import save_adapter
from jaxgrpo.processes import first_process
from jaxgrpo.records.run_directory import RunDirectory, atomic_write_json, atomic_write_text
from jaxgrpo.session import Session, open_session, warn_user
from jaxgrpo.study.config import Interrupted, StudyFiles
from jaxgrpo.study.dynamic import cut_adapter
from jaxgrpo.train import Replan, TrainResult, summary, train_session


def check_same_prompts(config: Config, session: Session) -> None:
    """Raises ConfigError if a study's data is not what its profile was made from."""
    profile = RunDirectory(StudyFiles(config.run_dir).profile("grpo"))
    if not profile.summary.is_file():
        return
    recorded = json.loads(profile.summary.read_text(encoding="utf-8")).get("prompts", {})
    for split, now in session.prompt_hashes.items():
        if recorded.get(split, now) != now:
            raise ConfigError(
                f"data.path {config.data.path} holds other rows ({split}) than when the study in "
                f"{config.run_dir} began; choose another run_dir, or remove this one to start over"
            )


class Lab:
    """Opens the model when the first run needs it; a study that is done needs none."""

    def __init__(self, config: Config, console: Console) -> None:
        self._config = config
        self._console = console
        self._session: Session | None = None
        self._programs: dict[tuple, Programs] = {}

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = open_session(self._config, self._console)
            check_same_prompts(self._config, self._session)
            warn_user(self._config, self._session, self._console)
        return self._session

    def programs(self, session: Session) -> Programs:
        """Compiled programs for a session's configuration; plans, seeds and rules share them."""
        config = session.config
        length = None if config.optim.schedule == "constant" else config.steps
        key = (config.objective, config.weight_grad_norms, config.optim, length)
        if key not in self._programs:
            made = make_programs(session)
            if not self._programs:
                made = compile_ahead(session, made, evaluates=config.eval.before_training)
            else:
                first = next(iter(self._programs.values()))
                made = dataclasses.replace(
                    made,
                    decode_weights=first.decode_weights,
                    generate=first.generate,
                    generate_eval=first.generate_eval,
                    generate_greedy=first.generate_greedy,
                    logprobs=first.logprobs,
                )
            self._programs[key] = made
        return self._programs[key]

    def run(
        self,
        title: str,
        config: Config,
        *,
        replan: Replan | None = None,
        track_sensitivity: bool = False,
    ) -> None:
        """Trains `config` in its own run directory, from where it was.

        Raises:
            Interrupted: stopped early; the same call goes on.
            ConfigError: the directory holds another run.
        """
        self._console.rule(f"[bold]{title}", align="left")
        session = self.session.with_config(config)
        with jax.set_mesh(session.mesh):
            result = train_session(
                session,
                self.programs(session),
                self._console,
                replan=replan,
                track_sensitivity=track_sensitivity,
            )
        if result.interrupted:
            raise Interrupted(title)
        if result.after is not None:
            self._console.print(f"accuracy {result.after.describe()}", highlight=False)

    def cut(self, title: str, config: Config, source: Path, amount: Mapping[str, float]) -> None:
        """Evaluates what `compress` leaves of the adapter that a finished run ended with.

        Raises:
            ConfigError: the run has no checkpoint, or nothing is left.
        """
        self._console.rule(f"[bold]{title}", align="left")
        saved = read_adapter(RunDirectory(source).checkpoints)
        if saved is None:
            raise ConfigError(f"{source} has no checkpoint to cut; remove it to train it again")
        lora, plan = cut_adapter(saved.lora, saved.plan, amount)
        session = self.session.with_config(config).with_plan(plan)
        run, first = RunDirectory(Path(config.run_dir)).create(), first_process()
        with run.lock() if first else nullcontext(), jax.set_mesh(session.mesh):
            placed = session.place_lora(jax.tree.map(lambda x: np.asarray(x, np.float32), lora))
            policy = f"{source.name}, cut"
            place = EvalPlace(run.eval, policy, config.steps)
            after = run_eval(session, self.programs(session), placed, place, self._console)
            if first:
                atomic_write_text(run.config, dump_config(config))
                save_adapter(run.adapter, lora, plan, str(config.model.path))
                result = TrainResult(None, after, run, {}, interrupted=False)
                atomic_write_json(run.summary, summary(session, result, saved.plan))
        self._console.print(f"accuracy {after.describe()}", highlight=False)

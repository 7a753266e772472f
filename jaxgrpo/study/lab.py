"""What runs on the device for a study: one open model, and programs shared by all of its runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from jaxgrpo.ahead.memory import fitting_arms
from jaxgrpo.checkpoint import read_adapter
from jaxgrpo.compile_ahead import compile_ahead
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import dump_config
from jaxgrpo.evaluate import EvalPlace
from jaxgrpo.evaluate_run import run_eval
from jaxgrpo.loop import Replan, TrainResult, summary
from jaxgrpo.model.adapters import save_adapter
from jaxgrpo.processes import check_agreement, first_process
from jaxgrpo.programs import Programs, make_programs
from jaxgrpo.records.run_directory import RunDirectory, atomic_write_json, atomic_write_text
from jaxgrpo.session import Session, describe_session, warn_user
from jaxgrpo.study.config import Interrupted, StudyFiles
from jaxgrpo.study.dynamic import cut_adapter
from jaxgrpo.train import train_arms, train_session


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
        self._loaded = False
        self._programs: dict[tuple, Programs] = {}

    @property
    def described(self) -> Session:
        """The session, whose weights may not be there yet: programs compile while they load."""
        if self._session is None:
            self._session = describe_session(self._config)
            check_same_prompts(self._config, self._session)
            warn_user(self._config, self._session, self._console)
        return self._session

    @property
    def session(self) -> Session:
        """The session with its weights."""
        if not self._loaded:
            self._session, self._loaded = self.described.load(self._console), True
        return self.described

    def programs(
        self, session: Session, arms: int = 1, track_sensitivity: bool = False
    ) -> Programs:
        """Compiled programs for a session's configuration; plans, seeds, rules, learning
        rates and numbers of steps share them. The first that take so many arms compile ahead."""
        config = session.config
        arms = session.model_config.device.arm_slots(arms)
        optim = dataclasses.replace(config.optim, learning_rate=1.0)
        key = (config.objective, config.weight_grad_norms, optim, arms)
        if key not in self._programs:
            made, known = make_programs(session, arms), list(self._programs.values())
            if known:
                made = dataclasses.replace(
                    made,
                    decode_weights=known[-1].decode_weights,
                    generate=known[-1].generate,
                    generate_eval=known[-1].generate_eval,
                    generate_greedy=known[-1].generate_greedy,
                    logprobs=known[-1].logprobs,
                )
            if arms not in {of_others.arms for of_others in known}:
                evaluates = config.eval.before_training
                made = compile_ahead(
                    session, made, evaluates=evaluates, track_sensitivity=track_sensitivity
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
        with jax.set_mesh(self.described.mesh):
            programs = self.programs(
                self.described.with_config(config), track_sensitivity=track_sensitivity
            )
            result = train_session(
                self.session.with_config(config),
                programs,
                self._console,
                replan=replan,
                track_sensitivity=track_sensitivity,
            )
        if result.interrupted:
            raise Interrupted(title)
        if result.after is not None:
            self._console.print(f"accuracy {result.after.describe()}", highlight=False)

    def together(self, config: Config, most: int) -> int:
        """How many arms like this one, at most so many, are trained side by side.

        Raises:
            ConfigError: processes of the job find it different.
        """
        # Without weights: they may be trained elsewhere.
        session = self.described.with_config(config)
        sizes = dict(session.mesh.shape)
        found = fitting_arms(config, session.model_config, session.plan, sizes, most)
        check_agreement("room for arms side by side: give study.together", str(found))
        return found

    def run_arms(
        self,
        title: str,
        configs: Sequence[Config],
        slots: int,
        *,
        replans: Sequence[Replan | None] = (),
        track_sensitivity: bool = False,
    ) -> list[TrainResult | Exception]:
        """`run` of several arms in the same programs, which have room for `slots`."""
        self._console.rule(f"[bold]{title}", align="left")
        with jax.set_mesh(self.described.mesh):
            first = self.described.with_config(configs[0])
            programs = self.programs(first, slots, track_sensitivity)
            sessions = [self.session.with_config(config) for config in configs]
            return train_arms(
                sessions,
                programs,
                self._console,
                replans=replans,
                track_sensitivity=track_sensitivity,
            )

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

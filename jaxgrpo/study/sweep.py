"""A sweep: studies of several model sizes whose arms are tasks of Ray, or run in turn without it.

No jax: what computes runs in Ray's workers, or in the study itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from jaxgrpo.config import EMBEDDED, ConfigError
from jaxgrpo.study.config import StudyConfig
from jaxgrpo.study.result_types import Results


@dataclass(frozen=True)
class SweepSettings:
    """What `sweep:` holds: which models, and what a task gets of the cluster: an arm, or as many
    side by side as `study.together` says."""

    models: tuple[str, ...] = ()
    """As `model.path`; one study each, under run_dir by the model's name. Default: model.path."""
    engine: Literal["auto", "ray", "sequential"] = "auto"
    """auto: Ray if it is installed, otherwise one study after another, as `study` does."""
    address: str | None = None
    """A running Ray cluster, `auto` for the one around; default: one on this machine."""
    hosts: int = 1
    """Processes of a task: 1 runs it on its own, more through Ray Train's JaxTrainer."""
    cpus: float = 1.0
    """Per process; so are gpus and tpus (chips)."""
    gpus: float = 0.0
    tpus: float = 0.0
    tpu_type: str | None = None
    """Ray's name of the slice a task spans, TPU-V6E for instance, with tpu_topology 4x4."""
    tpu_topology: str | None = None
    retries: int = 3
    """How often arms whose worker was lost are started again, from their own checkpoints."""

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus", "tpus", "retries"):
            if getattr(self, name) < 0:
                raise ConfigError(f"sweep.{name} must be >= 0")
        if self.hosts < 1:
            raise ConfigError(f"sweep.hosts must be at least 1, got {self.hosts}")
        if (self.tpu_type is None) != (self.tpu_topology is None):
            raise ConfigError("sweep.tpu_type and sweep.tpu_topology go together")
        names = [Path(model).name for model in self.models]
        if len(set(names)) != len(names):
            raise ConfigError(f"sweep.models: two have the same name: {', '.join(self.models)}")


@dataclass(frozen=True)
class SweepConfig(StudyConfig):
    """A study, and how its arms are spread."""

    sweep: SweepSettings = field(default_factory=SweepSettings)

    def studies(self) -> list[StudyConfig]:
        """One study per model, with paths that hold wherever a worker runs."""
        names = [f.name for f in dataclasses.fields(StudyConfig)]
        plain = StudyConfig(**{name: getattr(self, name) for name in names})
        root = Path(self.run_dir).expanduser().absolute()
        models = self.sweep.models or (self.model.path,)
        data = dataclasses.replace(self.data, path=_anchored(self.data.path))
        return [
            dataclasses.replace(
                plain,
                run_dir=str(root / Path(model).name if self.sweep.models else root),
                model=dataclasses.replace(self.model, path=_anchored(model)),
                data=data,
            )
            for model in models
        ]


def _anchored(path: str) -> str:
    """A path that exists here as an absolute one; `embedded` and a hub id stay what they are."""
    local = Path(path).expanduser()
    return str(local.absolute()) if path != EMBEDDED and local.exists() else path


def run_sweep(config: SweepConfig, console: Console) -> list[Results]:
    """Runs what is missing of every study, then their reports; the results in order.

    Raises:
        ConfigError: a configuration that cannot run, or an engine that is not there.
        Interrupted: stopped early and saved; the same call goes on.
        OSError: an arm failed for good, with its reason.
    """
    from jaxgrpo.study.arms import run_study

    studies = config.studies()
    installed = importlib.util.find_spec("ray") is not None
    if config.sweep.engine == "ray" and not installed:
        raise ConfigError("sweep.engine=ray, but Ray is not installed: pip install 'jaxgrpo[ray]'")
    if config.sweep.engine != "sequential" and installed:
        from jaxgrpo.study.cluster import run_on_ray

        run_on_ray(config.sweep, studies, console)
    elif config.sweep.hosts > 1:
        raise ConfigError(f"sweep.hosts={config.sweep.hosts} needs Ray: pip install 'jaxgrpo[ray]'")
    # Of a study whose arms are done this only makes the report.
    found = [run_study(study, console) for study in studies]
    return [results for results in found if results is not None]

"""Weights & Biases, for those who ask for it by `wandb_project`. Floor 0: no jax."""

from __future__ import annotations

import importlib
import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.config import ConfigError
from jaxgrpo.records.run_directory import atomic_write_text

ID_FILE = "wandb_id"


def check_wandb(project: str | None) -> None:
    """Raises ConfigError, with what to install, if a project is named and wandb is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb_project needs the package wandb: pip install 'jaxgrpo[wandb]'")


class WandbTracker:
    """One run at Weights & Biases; a resumed run goes on in it.

    WANDB_MODE=offline keeps it in run_dir/wandb, to be synced later.

    Raises:
        ConfigError: wandb does not start, for instance without a key.
    """

    def __init__(self, project: str, root: Path, settings: Mapping[str, Any]) -> None:
        # An optional package: named in text, so that types are checked without it.
        wandb: Any = importlib.import_module("wandb")
        # The id goes with the directory, so that it is the same run wherever it is resumed.
        path = root / ID_FILE
        if not path.is_file():
            atomic_write_text(path, uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=project,
                name=root.name,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=root,
                config=dict(settings),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # its own errors, the network's, a key's
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"wandb_project: wandb does not start ({reason}); WANDB_MODE=offline needs no "
                "network and no key"
            ) from None
        self._wandb = wandb

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self._run.log(dict(metrics), step=step)

    def log_samples(
        self, step: int, images: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Pictures, and a table of completions."""
        content: dict[str, Any] = {name: self._wandb.Image(image) for name, image in images.items()}
        columns = ["prompt", "completion", "answer", "reward", "advantage"]
        if rows:
            table = self._wandb.Table(columns, [[row[name] for name in columns] for row in rows])
            content["completions"] = table
        self._run.log(content, step=step)

    def result(self, metrics: Mapping[str, float]) -> None:
        """The numbers of the finished run."""
        self._run.summary.update(dict(metrics))

    def finish(self) -> None:
        """Ends it; a run that goes on later does so under the same id."""
        self._run.finish()

"""Whether two runs are the same: by their decoded settings, not by how these were written down.

A setting that is younger than a run has its default there. Where a run is, how it is watched, and
what only costs time and memory, are no part of what it is. No jax.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import decode_config, flat_settings, read_yaml

PLACE = ("run_dir",)
WATCHING = (
    "checkpoint_every_steps",
    "keep_checkpoints",
    "log_completions_every_steps",
    "reward_timeout_s",
    "wandb_project",
)
COST = ("mesh", "model.remat", "grpo.micro_batches", "grpo.logprob_chunk_tokens")
"""Time and memory; the numbers stay the same but for rounding."""


def decode_recorded(raw: Mapping[str, Any], where: Path, cls: type = Config) -> Any:
    """Settings as a run recorded them, with the defaults of those that it did not know.

    Raises:
        ConfigError: they hold one that there is no more, or a value that cannot be any more.
    """
    try:
        return decode_config(raw, cls)
    except ConfigError as error:
        raise ConfigError(f"{where} was made by another version of jaxgrpo: {error}") from None


def read_recorded(path: Path, cls: type = Config) -> Any | None:
    """The settings in a run's config.yaml, or None where there is no such file.

    Raises:
        ConfigError: as `decode_recorded`, or the file is not one of settings.
    """
    return decode_recorded(read_yaml(path, cls), path, cls) if path.is_file() else None


def identity(config: Config, *free: str) -> dict[str, Any]:
    """The settings that make a run what it is, dotted name -> value.

    Args:
        free: further settings or sections that may differ, besides PLACE, WATCHING and COST.
    """
    without = (*PLACE, *WATCHING, *COST, *free)
    return {name: v for name, v in flat_settings(config).items() if not is_of(name, without)}


def is_of(name: str, settings: Iterable[str]) -> bool:
    """Whether a dotted name is one of the settings or lies in one of the sections."""
    return any(name == one or name.startswith(f"{one}.") for one in settings)


def first_difference(old: Any, new: Any, where: str = "") -> str | None:
    """The first place in which two nested mappings differ, as a sentence; None: nowhere."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(k for k in new if k not in old)]:
            dotted = f"{where}.{key}" if where else str(key)
            found = first_difference(old.get(key), new.get(key), dotted)
            if found:
                return found
        return None
    return None if old == new else f"{where} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    """So that both values are seen in a message, however long one of them is."""
    text = str(value)
    return text if len(text) <= 160 else f"{text[:159]}…"

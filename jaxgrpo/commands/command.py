"""A command of the command line: its words, its settings, its help. No jax."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import flat_settings, load_config
from jaxgrpo.identity import first_difference, is_of, read_recorded

EMBEDDED_CONFIG = Path(__file__).resolve().parent.parent / "assets" / "embedded.yaml"
STUDY_CONFIG = EMBEDDED_CONFIG.with_name("study_embedded.yaml")
PROGRAM = "python -m jaxgrpo.run"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        run: settings and console -> exit code.
        summary: what it does, in a line of the table of commands.
        help: what else there is to know, in lines of at most 80 characters.
        example: arguments that work as they stand.
        config: the dataclass of its settings.
        default: the file of settings if none is named.
        positional: the setting that a word without "=" gives; None: such words are files of
            settings, or run directories.
        collects: what takes its own words out before settings are read, and gives settings.
        dry_run: whether --dry-run is understood.
        ignores: settings and sections that never take effect here: giving one is an error.
        fixed: those that a checkpoint in run_dir has settled: giving another value is an error.
    """

    run: Callable[[Any, Console], int]
    summary: str
    help: str
    example: str
    config: type = Config
    default: Path = EMBEDDED_CONFIG
    positional: str | None = None
    collects: Callable[[list[str]], tuple[list[str], dict[str, Any]]] | None = None
    dry_run: bool = False
    ignores: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


def parse_settings(name: str, command: Command, words: Sequence[str]) -> Any:
    """A command's words as its settings.

    Raises:
        ConfigError: an unknown option, file or setting, or a value that cannot be.
    """
    rest, collected = list(words), {}
    if command.collects is not None:
        rest, collected = command.collects(rest)
    paths, overrides = [], []
    for word in rest:
        if word.startswith("-"):
            raise ConfigError(f"unknown option {word}; settings are written key=value")
        if "=" in word and not is_there(word):
            overrides.append(word)
        else:
            paths.append(word)
    if command.positional is not None:
        if len(paths) > 1:
            raise ConfigError(f"{name} takes one {command.positional}, got {' and '.join(paths)}")
        settings = load_config([], overrides, command.config, _positional(command, paths))
    else:
        files = paths or [str(command.default)]
        settings = load_config(*_run_directories(files, overrides), command.config)
        check_effect(name, command, overrides, settings)
    return dataclasses.replace(settings, **collected) if collected else settings


def check_effect(name: str, command: Command, overrides: Sequence[str], settings: Any) -> None:
    """Raises ConfigError on the first setting of the command line that cannot take effect."""
    given = [override.partition("=")[0] for override in overrides]
    for key in given:
        if is_of(key, command.ignores):
            raise ConfigError(f"{key} cannot take effect: {name} has no use for it")
    fixed = [key for key in given if is_of(key, command.fixed)]
    run = Path(settings.run_dir).expanduser()
    if not fixed or not any(run.glob("checkpoints/[0-9]*")):
        return
    recorded = read_recorded(run / "config.yaml")
    was, now = ({} if c is None else flat_settings(c) for c in (recorded, settings))
    for key in ("rewards" if key.startswith("rewards.") else key for key in fixed):
        old, new = ({n: v for n, v in all_of.items() if is_of(n, [key])} for all_of in (was, now))
        if old and (difference := first_difference(old, new)):
            raise ConfigError(
                f"{key} cannot take effect: {run} holds a checkpoint; {difference}; "
                "give another run_dir"
            )


def _positional(command: Command, paths: list[str]) -> dict[str, Any]:
    return {str(command.positional): paths[0]} if paths else {}


def _run_directories(paths: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """A run directory stands for the config.yaml in it, wherever it has been moved to."""
    files = []
    for path in paths:
        inside = Path(path) / "config.yaml"
        if Path(path).is_dir():
            if not inside.is_file():
                raise ConfigError(f"{path} is a directory without config.yaml, not one of a run")
            files.append(str(inside))
            overrides = [f"run_dir={path}", *overrides]
        else:
            files.append(path)
    return files, overrides


def is_there(word: str) -> bool:
    """Whether a word of the command line is the name of a file."""
    try:
        return Path(word).exists()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        return False


def nearest_command(word: str, commands: Sequence[str]) -> str | None:
    """The command that was meant, or None if `word` may be a file."""
    if "=" in word or word.startswith("-") or is_there(word):
        return None
    near = difflib.get_close_matches(word, commands, n=1)
    return near[0] if near else None


def command_help(name: str, command: Command) -> str:
    """What COMMAND --help prints: it fits a screen of 24 lines."""
    places = {None: "[CONFIG|RUN_DIR ...]", "shell": "bash|zsh", "section": "[SECTION]"}
    words = places.get(command.positional, "DIRECTORY")
    option = " [--dry-run]" if command.dry_run else ""
    settings = " [key=value ...]" if command.positional not in ("shell", "section") else ""
    return (
        f"{PROGRAM} {name} {words}{settings}{option}\n\n{command.summary}\n\n"
        f"{command.help.strip()}\n\nexample:\n  {PROGRAM} {command.example}\n"
    )


def setting_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Every setting of a dataclass, dotted."""
    hints = typing.get_type_hints(cls)
    for member in dataclasses.fields(cls):
        kind = hints[member.name]
        if dataclasses.is_dataclass(kind):
            yield from setting_names(typing.cast(type, kind), f"{prefix}{member.name}.")
        else:
            yield prefix + member.name

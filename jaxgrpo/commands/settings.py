"""`settings`: every setting with its default and meaning, as the dataclasses say them. No jax."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from rich.console import Console

from jaxgrpo.bench.settings import BenchConfig
from jaxgrpo.commands.command import Command
from jaxgrpo.config import ConfigError, suggestion
from jaxgrpo.study.sweep import SweepConfig


@dataclass(frozen=True)
class SettingsSettings:
    """Which of them."""

    section: str = ""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dotted, as it is written before the "=".
        kind: what values it takes, as the dataclass says it.
        default: as it is written after the "=".
        meaning: one paragraph, or nothing where the name says it all.
    """

    name: str
    kind: str
    default: str
    meaning: str


def all_settings() -> dict[str, Setting]:
    """Name -> setting, of runs, studies, sweeps and benchmarks."""
    found: dict[str, Setting] = {}
    for cls in (SweepConfig, BenchConfig):
        found |= {setting.name: setting for setting in settings_of(cls)}
    return found


def settings_of(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Those of a dataclass: its own first, then its sections'."""
    hints, kinds, meanings = typing.get_type_hints(cls), *_source(cls)
    sections = []
    for member in dataclasses.fields(cls):
        kind = hints[member.name]
        if dataclasses.is_dataclass(kind):
            sections.append((typing.cast(type, kind), f"{prefix}{member.name}."))
            continue
        default = member.default
        if member.default_factory is not dataclasses.MISSING:
            default = member.default_factory()
        meaning = meanings.get(member.name, "")
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        shown = ", ".join(map(str, choices)) or kinds[member.name]
        yield Setting(prefix + member.name, shown, _as_written(default), meaning)
    for kind, name in sections:
        yield from settings_of(kind, name)


def _source(cls: type) -> tuple[dict[str, str], dict[str, str]]:
    """Of every field, inherited ones too: its annotation, and the text that stands under it."""
    kinds: dict[str, str] = {}
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, following in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            kinds[node.target.id] = ast.unparse(node.annotation)
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                meanings[node.target.id] = " ".join(str(following.value.value).split())
    return kinds, meanings


def _as_written(value: Any) -> str:
    """After "key=": text literally, everything else as YAML."""
    if isinstance(value, str):
        return value
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def run(settings: SettingsSettings, console: Console) -> int:
    known, section = all_settings(), settings.section.rstrip(".")
    shown = [s for name, s in known.items() if f"{name}.".startswith(f"{section}.") or not section]
    if not shown:
        sections = {name.rpartition(".")[0] for name in known} - {""}
        names = [*sorted(sections), *known]
        raise ConfigError(
            f"there is no setting or section '{section}'; {suggestion(section, names)}"
        )
    for setting in shown:
        print(f"{setting.name}={setting.default}    ({setting.kind})")
        for line in textwrap.wrap(setting.meaning, 76):
            print(f"    {line}")
    return 0


SETTINGS = Command(
    run,
    "print settings with their defaults and meanings",
    "One section, one setting, or all of them. They are written key=value on the\n"
    "command line, nested in a YAML file.\n\n"
    "  jaxgrpo settings            all, those of studies, sweeps and bench too\n"
    "  jaxgrpo settings grpo       a section\n"
    "  jaxgrpo settings lora.rank  one",
    "settings lora",
    config=SettingsSettings,
    positional="section",
)

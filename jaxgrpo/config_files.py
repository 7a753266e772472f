"""Reading and writing configurations: YAML files, `key=value` overrides, strict decoding.

Files are merged left to right, key by key, then the overrides. An unknown or repeated key is an
error that names the nearest valid one. No jax: a report or a plan is made on machines without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from jaxgrpo.config import Config, ConfigError, suggestion
from jaxgrpo.config_yaml import (
    MAX_YAML_BYTES,
    OneLineDumper,
    TextError,
    is_optional,
    is_text,
    parse_yaml,
    setting_kind,
)


def load_config(
    paths: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    cls: type = Config,
    first: Mapping[str, Any] | None = None,
) -> Any:
    """Reads YAML files, merges them left to right, applies `a.b=value` overrides and decodes.

    Args:
        cls: Config, or a dataclass that adds sections to it.
        first: settings that files and overrides come after.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, a wrong type or value.
    """
    merged: dict[str, Any] = dict(first or {})
    for path in paths:
        merged = _laid_over(merged, read_yaml(path, cls))
    changes: dict[str, Any] = {}
    for override in overrides:
        # Rewards given one by one add up; together they replace those of the files.
        whole = "" if override.startswith("rewards.") else "rewards"
        changes = merge(changes, parse_override(override, cls), whole)
    return decode_config(_laid_over(merged, changes), cls)


_OF_A_PATH = {"model": ("revision",), "data": ("name", "revision")}
"""Settings that say which of several things a section's `path` means, and nothing without it."""


def _laid_over(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`merge`; another `path` takes what belonged to the one before it along."""
    kept = dict(base)
    for section, names in _OF_A_PATH.items():
        old, new = base.get(section), update.get(section)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and "path" in new:
            same = old.get("path") == new["path"]
            kept[section] = {k: v for k, v in old.items() if same or k not in names}
    return merge(kept, update)


def decode_config(raw: Mapping[str, Any], cls: type = Config) -> Any:
    """Decodes a plain mapping into `cls`, strictly."""
    check_keys(raw, cls)
    try:
        return draccus.decode(cls, raw)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_decode_message(error)) from error


def _decode_message(error: BaseException) -> str:
    """One line out of draccus' nested errors; a ConfigError inside wins."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    key = ".".join(getattr(error, "key_path", None) or ())
    text = " ".join(str(getattr(error, "message", None) or error).split())
    return f"{key}: {text}" if key and key not in text else text


def read_yaml(path: str | Path, cls: type) -> dict[str, Any]:
    """A file's settings as a mapping; its text settings are what stands in the file.

    Raises:
        ConfigError: no such file, no mapping, or text that YAML would change.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"config file {path} is larger than {MAX_YAML_BYTES:,} bytes")
        raw = parse_yaml(path.read_text(encoding="utf-8"), cls)
    except TextError as error:
        raise ConfigError(f"config file {path}: {error}") from None
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist{_nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"config file {path} is not YAML: {' '.join(str(error).split())}"
        ) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path} must hold a mapping, got {type(raw).__name__}")
    return raw


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def parse_override(text: str, cls: type = Config) -> dict[str, Any]:
    """`a.b=value` as a nested mapping. Text is taken literally, but for `null`, which sets a text
    that may be left out to none; any other value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{text}' is not of the form key=value")
    # A reward's key may itself hold dots (my.module:function), so only its first dot separates.
    parts = key.split(".", 1) if key.startswith("rewards.") else key.split(".")
    kind = setting_kind(cls, parts)
    nested: Any = value
    if not is_text(kind):
        nested = _parse_value(text, value, kind, key)
    elif value == "null" and is_optional(kind):
        nested = None
    for part in reversed(parts):
        nested = {part: nested}
    return nested


def _parse_value(text: str, value: str, kind: Any, key: str) -> Any:
    try:
        return parse_yaml(value, kind, key)
    except TextError as error:
        raise ConfigError(str(error)) from None
    except (yaml.YAMLError, ValueError) as error:  # numbers and dates raise their own
        reason = " ".join(str(error).split())
        raise ConfigError(f"override '{text[:80]}': {reason[:300]}") from None


def merge(
    base: Mapping[str, Any], update: Mapping[str, Any], whole: str = "rewards"
) -> dict[str, Any]:
    """Deep merge: mappings key by key, anything else replaced, the key `whole` too."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and key != whole:
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


MAY_BE_EMPTY = ("data.system_prompt", "data.prompt_suffix")
"""Text of no characters means something here; elsewhere it is a value that was forgotten."""


def check_keys(raw: Mapping[str, Any], cls: type, where: str = "") -> None:
    """Raises ConfigError on the first key of `raw` that `cls` does not have, naming the nearest."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in raw.items():
        dotted = f"{where}{key}"
        if key not in names:
            hint = suggestion(str(key), names)
            home = _elsewhere(str(key), cls) if "valid:" in hint and not where else None
            raise ConfigError(f"unknown key '{dotted}'; {home or hint}")
        kind = hints[key]
        # A section that may be left out: its class or None.
        section = next(filter(dataclasses.is_dataclass, typing.get_args(kind)), None)
        if section is not None and value is not None:
            kind = section
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{dotted} must be a mapping, got {value!r}")
            check_keys(value, typing.cast(type, kind), f"{dotted}.")
        elif value == "" and is_text(kind) and dotted not in MAY_BE_EMPTY:
            raise ConfigError(f"{dotted} is empty; give a value or leave the key out")
        else:
            _check_kind(dotted, kind, value)


def _check_kind(dotted: str, kind: Any, value: Any) -> None:
    """Refuses what the decoder would convert silently, or would refuse in its own words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if value is None and type(None) not in arguments:
        raise ConfigError(f"{dotted} is empty; give a value or leave the key out")
    if origin is dict:
        if not isinstance(value, Mapping):
            what = "a mapping of names to weights" if arguments[1] is float else "a mapping"
            raise ConfigError(f"{dotted} must be {what}, got {value!r}")
        for name, weight in value.items():
            _check_kind(f"{dotted}.{name}", arguments[1], weight)
    elif origin is tuple:
        if isinstance(value, Mapping):
            raise ConfigError(f"{dotted} must be a list, got {value!r}")
        # Text is a sequence too, and would be taken apart letter by letter.
        if not isinstance(value, list | tuple):
            raise ConfigError(
                f"{dotted} must be a list, as in {dotted.rsplit('.', 1)[-1]}=[{value}]"
            )
        for index, item in enumerate(value):
            _check_kind(f"{dotted}.{index}", arguments[0], item)
    elif isinstance(value, bool | list | Mapping) and {kind, *arguments} & {int, float}:
        raise ConfigError(f"{dotted} must be a number, got {value!r}")
    elif isinstance(value, bool | list | Mapping) and str in (kind, *arguments):
        raise ConfigError(f"{dotted} must be text, got {value!r}")


def _elsewhere(key: str, cls: type) -> str | None:
    """A section's own key written at the top level is a common slip: say where it belongs."""
    for section, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind) and key in (f.name for f in dataclasses.fields(kind)):
            return f"did you mean '{section}.{key}'?"
    return None


def encode_config(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain JSON-able values; `decode_config` is its inverse."""
    return typing.cast(dict, draccus.encode(config))


def flat_settings(config: Config) -> dict[str, Any]:
    """The resolved settings, dotted name -> value; `rewards` is one of them."""

    def flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            section = isinstance(value, Mapping) and name != "rewards"
            found |= flat(value, f"{prefix}{name}.") if section else {prefix + name: value}
        return found

    return flat(encode_config(config), "")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back equal."""
    # On one line each: a text that is broken over lines is not what stands in the file.
    return yaml.dump(encode_config(config), Dumper=OneLineDumper, sort_keys=False, width=2**31)

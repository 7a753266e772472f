"""YAML for settings: no repeated key, no document that grows, and text that stays text.

YAML reads an unquoted 1.10 as 1.1, 0010 as 8 and on as true, cuts text at " #" and joins its lines.
Where a setting is text, such a scalar is refused, with the way to write it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml


class TextError(Exception):
    """A scalar that would not come out as the text that was written."""


def parse_yaml(text: str, kind: Any, name: str = "") -> Any:
    """One document.

    Args:
        kind: the dataclass, or type of a setting, that it is for: says where text is meant.
        name: of the setting.

    Raises:
        TextError: text that would be changed; one line says how to write it.
        yaml.YAMLError, ValueError: not YAML, or a number or date that cannot be.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_bounded_node()
        if node is None:
            return None
        _check_texts(loader, node, kind, name)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    finally:
        loader.dispose()


MAX_YAML_BYTES = 2**20
MAX_NODES = 100_000
"""More than any configuration has; a few lines of nested aliases can stand for billions."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader, but a repeated key is an error: YAML would silently keep the last one."""

    def get_bounded_node(self) -> yaml.Node | None:
        """The document, refused if its aliases would make it grow beyond measure."""
        node = self.get_single_node()
        if node is not None and _expanded_size(node, {}) > MAX_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, "it is too large with its aliases", node.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.flatten_mapping(node)
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be text", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are once every alias has been written out."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # what an alias inside its own anchor comes to
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in children)
    return known[id(node)]


class OneLineDumper(yaml.SafeDumper):
    """SafeDumper that writes text with line breaks in double quotes, on one line."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Text as a scalar node."""
        style = '"' if len(text.splitlines()) > 1 or text.endswith("\n") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


OneLineDumper.add_representer(str, OneLineDumper.represent_text)


def setting_kind(cls: Any, parts: Sequence[str]) -> Any:
    """The type of the setting with these names, one a level; None: there is no such setting."""
    for part in parts:
        if not dataclasses.is_dataclass(cls):
            return None
        cls = typing.get_type_hints(cls).get(part)
    return cls


def is_text(kind: Any) -> bool:
    """Whether a setting of this type holds text, or one of several words."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return all(isinstance(word, str) for word in arguments)
    return kind is str or (_is_union(kind) and str in arguments)


def is_optional(kind: Any) -> bool:
    """Whether a setting of this type may be none."""
    return _is_union(kind) and type(None) in typing.get_args(kind)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _check_texts(loader: _StrictLoader, node: yaml.Node, kind: Any, name: str) -> None:
    """Raises TextError on the first scalar under `node` that is meant as text and not read so."""
    if dataclasses.is_dataclass(kind) and isinstance(node, yaml.MappingNode):
        hints = typing.get_type_hints(kind)
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for part in merged:
                    _check_texts(loader, part, kind, name)
            elif isinstance(key, yaml.ScalarNode) and key.value in hints:
                dotted = f"{name}.{key.value}" if name else key.value
                _check_texts(loader, value, hints[key.value], dotted)
    elif typing.get_origin(kind) is tuple and isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_texts(loader, item, typing.get_args(kind)[0], f"{name}.{index}")
    elif is_text(kind) and isinstance(node, yaml.ScalarNode):
        _check_text(loader, node, kind, name)


def _check_text(loader: _StrictLoader, node: yaml.ScalarNode, kind: Any, name: str) -> None:
    """Quoted text, and blocks after | or >, are what their writer chose; the rest is looked at."""
    written = node.value
    if node.style is not None or (written == "null" and is_optional(kind)):
        return
    if written == "":
        raise TextError(f"{name} is empty; give a value or leave the key out")
    start, end = node.start_mark, node.end_mark
    text = start.buffer or ""
    source, rest = text[start.pointer : end.pointer], text[end.pointer :].splitlines()[:1]
    if len(source.splitlines()) > 1:
        raise TextError(
            f"{name} goes over several lines, which YAML would join; write it after | (lines stay) "
            "or >- (lines are joined), or in quotes"
        )
    follows = rest[0].strip() if rest else ""
    # One word may well have a comment of its own beside it.
    if follows.startswith("#") and (" " in source.strip() or not follows.startswith("# ")):
        raise TextError(
            f"{name}: {follows!r:.60} would be lost as a comment; write the text in quotes, or the "
            "comment on a line of its own"
        )
    if node.tag.endswith(":str"):
        return
    value = loader.construct_object(node)
    if isinstance(value, bool) or str(value) != written:
        quoted = "'" + written.replace("'", "''") + "'"
        raise TextError(f"{name}: YAML reads {written:.60} as {value!r:.60}; write {quoted:.60}")
    loader.constructed_objects.pop(node)
    node.tag = "tag:yaml.org,2002:str"  # a number that is the same as text

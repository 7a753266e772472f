"""The text of a compiled HLO module as instructions. No jax."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_SIZES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,<= ]*)\](\{[^{}]*\})?")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
ASYNC = 'custom_call_target="AsyncCollective'
"""Starts or ends a collective that runs beside fusions."""


@dataclass(frozen=True)
class Array:
    """One array of an instruction: `fast` if it lives in the chip's own memory and not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> float:
        if self.dtype in _SIZES:
            size = _SIZES[self.dtype]
        else:
            bits = re.search(r"[0-9]+", self.dtype)
            size = int(bits[0]) / 8 if bits else 0
        return math.prod(self.dims) * size

    @property
    def hbm(self) -> float:
        return 0.0 if self.fast else self.bytes


@dataclass
class Instruction:
    name: str
    opcode: str
    results: list[Array]
    operands: list[str]
    inner: str
    rest: str


Module = dict[str, tuple[bool, dict[str, Instruction]]]


def parse(text: str) -> Module:
    module: Module = {}
    inside: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if inside is None:
            head = _HEAD.match(line)
            if head is not None and not line.startswith("HloModule"):
                inside = {}
                module[head[2]] = (head[1] is not None, inside)
        elif line.startswith("}"):
            inside = None
        else:
            found = _INSTRUCTION.match(line)
            if found is not None:
                made = _instruction(found[2], found[3])
                if made is not None:
                    inside[made.name] = made
    return module


def _instruction(name: str, right: str) -> Instruction | None:
    code = _OPCODE.search(" " + right)
    if code is None:
        return None
    start = max(code.start(1) - 1, 0)
    results = [_array(m) for m in _ARRAY.finditer(right[:start])]
    opened = right.index("(", start)
    depth, end = 0, opened
    for end in range(opened, len(right)):
        depth += {"(": 1, ")": -1}.get(right[end], 0)
        if depth == 0:
            break
    inner = right[opened + 1 : end]
    operands = _NAME.findall(inner)
    return Instruction(name, code[1], results, operands, inner, right[end + 1 :])


def _array(match: re.Match) -> Array:
    dims = tuple(int(d.replace("<=", "")) for d in match[2].split(",") if d.strip())
    return Array(match[1], dims, "S(1)" in (match[3] or ""))


def is_collective(one: Instruction) -> bool:
    return one.opcode.removesuffix("-start") in COLLECTIVES


def computation_of(one: Instruction, key: str) -> str:
    match = re.search(rf"{key}=%?([\w.\-]+)", one.rest)
    assert match is not None, (key, one.rest[:200])
    return match[1]


def results_of(instructions: dict[str, Instruction], name: str) -> list[Array]:
    return instructions[name].results

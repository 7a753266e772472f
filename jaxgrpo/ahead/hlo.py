"""Counts what a compiled program does, from its HLO text: operations, bytes, collectives, loops.

Shapes in a compiled program are those of one device, so every figure is per device. The bodies of
loops count as often as their counter allows: a loop that may end early, as decoding does when all
rows have ended, counts as if it did not, and one that goes on where another stopped finds nothing
left to do. No jax.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from jaxgrpo.ahead.hlo_costs import bytes_of, flops_of
from jaxgrpo.ahead.hlo_loops import trip_count
from jaxgrpo.ahead.hlo_text import (
    Instruction,
    Module,
    computation_of,
    is_collective,
    parse,
    results_of,
)

_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([0-9,]+)\}|\[(\d+),(\d+)\]"
    r"|mesh\[([^\]]*)\](?:, device_ids=\S+)? \{(.*?)\})"
)

_KERNEL = re.compile(r'custom_call_target="([^"]*(?:mosaic|triton|fmha|tpu_custom_call)[^"]*)"')
"""Programs written elsewhere, whose operations the text does not tell."""
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "add-dependency", "opt-barrier",
    "copy-done", "async-done", "async-update", "domain", "iota",
}  # fmt: skip
"""What moves no data by itself."""
_PLAIN = {
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan2", "atanh", "bitcast-convert",
    "broadcast", "cbrt", "ceil", "clamp", "compare", "complex", "concatenate", "convert", "copy",
    "copy-start", "cosine", "cosh", "count-leading-zeros", "divide", "dynamic-slice",
    "dynamic-update-slice", "erf", "exponential", "exponential-minus-one", "floor", "gather",
    "get-dimension-size", "imag", "is-finite", "log", "log-plus-one", "logistic", "map", "maximum",
    "minimum", "multiply", "negate", "not", "or", "pad", "popcnt", "power", "real", "reduce",
    "reduce-precision", "reduce-window", "remainder", "reshape", "reverse", "rng",
    "rng-bit-generator", "rng-get-and-update-state", "round-nearest-afz", "round-nearest-even",
    "rsqrt", "scatter", "select", "select-and-scatter", "set-dimension-size", "shift-left",
    "shift-right-arithmetic", "shift-right-logical", "sign", "sine", "sinh", "slice",
    "slice-start", "sort", "sqrt", "stochastic-convert", "subtract", "tan", "tanh", "topk",
    "transpose", "xor",
}  # fmt: skip
"""What has no matrix products inside and moves its operands and results, or a part of them."""
_COUNTED = {"dot", "convolution", "fusion"}
_HARMLESS = re.compile(
    r'custom_call_target="(?:[^"]*matmul[^"]*|AsyncCollective[^"]*|TopK|Sharding|AllocateBuffer)"'
)
"""Custom calls that are counted as products, or have none."""

LARGE = 2**20
"""Bytes of operands from which on an instruction of an unknown kind is worth a line."""


@dataclass
class Collective:
    """One kind of collective over groups of one size.

    Attributes:
        count: how many the program runs.
        bytes: of the results (of the operands for reduce-scatter), all of them together.
    """

    count: float = 0
    bytes: float = 0


@dataclass
class Counts:
    """What one device does in one run of a program.

    Attributes:
        flops: of matrix products and convolutions.
        bytes: read from and written to HBM.
        pieces: (flops, bytes, times) of every instruction, for a roofline.
        collectives: (kind, devices of a group) -> count and bytes.
        unbounded_loops: loops without a counter, whose bodies were counted once.
        kernels: targets of custom calls whose operations are not in `flops`.
        unknown: opcodes that are not known here, of instructions with more than LARGE bytes of
            operands, and how often such run: only their operands and results are counted.
    """

    flops: float = 0
    bytes: float = 0
    pieces: list[tuple[float, float, float]] = field(default_factory=list)
    collectives: dict[tuple[str, int], Collective] = field(
        default_factory=lambda: defaultdict(Collective)
    )
    unbounded_loops: int = 0
    kernels: set[str] = field(default_factory=set)
    unknown: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def count(text: str, devices: int = 1) -> Counts:
    """Counts a compiled module.

    Args:
        text: `compiled.as_text()`.
        devices: the size of a group that the text leaves open: all of them.
    """
    module = parse(text)
    counts = Counts()
    entry = next(name for name, (is_entry, _) in module.items() if is_entry)
    _walk(module, entry, 1.0, counts, devices)
    return counts


def _walk(module: Module, name: str, times: float, counts: Counts, devices: int) -> None:
    instructions = module[name][1]
    channels: set[str] = set()
    for one in instructions.values():
        if one.opcode == "while":
            trips = trip_count(module, name, one)
            counts.unbounded_loops += trips is None
            runs = times * (1 if trips is None else trips)
            _walk(module, computation_of(one, "body"), runs, counts, devices)
        elif one.opcode == "call" or (one.opcode == "async-start" and "calls=" in one.rest):
            key = "to_apply" if "to_apply=" in one.rest else "calls"
            _walk(module, computation_of(one, key), times, counts, devices)
        elif one.opcode == "conditional":
            _walk(module, _dearest(module, one, devices), times, counts, devices)
        else:
            if one.opcode == "fusion":
                for inner, each in _fused_collectives(module, one, channels):
                    _book_collective(inner, each, times, counts, devices)
            _book(module, instructions, one, times, counts, devices)


def _book(
    module: Module,
    instructions: dict[str, Instruction],
    one: Instruction,
    times: float,
    counts: Counts,
    devices: int,
) -> None:
    if is_collective(one):
        _book_collective(instructions, one, times, counts, devices)
        return
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return
    flops = flops_of(module, instructions, one)
    moved = bytes_of(module, instructions, one)
    counts.flops += times * flops
    counts.bytes += times * moved
    counts.pieces.append((flops, moved, times))
    if one.opcode == "custom-call" and (kernel := _KERNEL.search(one.rest)):
        counts.kernels.add(kernel[1])
    else:
        _book_unknown(module, instructions, one, times, counts)


def _book_unknown(
    module: Module,
    instructions: dict[str, Instruction],
    one: Instruction,
    times: float,
    counts: Counts,
) -> None:
    """Notes an instruction, or one inside a fusion, of which it is not known what it computes."""
    if one.opcode == "fusion":
        inner = module[computation_of(one, "calls")][1]
        for each in inner.values():
            _book_unknown(module, inner, each, times, counts)
        return
    if (
        one.opcode in _FREE | _PLAIN | _COUNTED
        or is_collective(one)
        or one.opcode.endswith("-done")
    ):
        return
    name = one.opcode
    if name == "custom-call":
        if _HARMLESS.search(one.rest):
            return
        target = re.search(r'custom_call_target="([^"]*)"', one.rest)
        name = f"custom-call to {target[1]}" if target else name
    operands = (results_of(instructions, n) for n in one.operands if n in instructions)
    if sum(array.bytes for arrays in operands for array in arrays) > LARGE:
        counts.unknown[name] += times


def _book_collective(
    instructions: dict[str, Instruction],
    one: Instruction,
    times: float,
    counts: Counts,
    devices: int,
) -> None:
    kind = one.opcode.removesuffix("-start")
    entry = counts.collectives[(kind, _group_size(one.rest, devices))]
    entry.count += times
    entry.bytes += times * _collective_bytes(one, instructions, kind)


def _fused_collectives(
    module: Module, fusion: Instruction, channels: set[str]
) -> list[tuple[dict[str, Instruction], Instruction]]:
    """The collectives inside a fusion, with the computation around them.

    A TPU moves data while it computes: one collective is then written into several fusions, the
    one that starts it and those that run meanwhile. `channels` are those met before.
    """
    inner = module[computation_of(fusion, "calls")][1]
    found = []
    for each in inner.values():
        if each.opcode == "fusion":
            found += _fused_collectives(module, each, channels)
        elif is_collective(each):
            channel = re.search(r"channel_id=(\d+)", each.rest)
            if channel is not None:
                if channel[1] in channels:
                    continue
                channels.add(channel[1])
            found.append((inner, each))
    return found


def _collective_bytes(one: Instruction, instructions: dict[str, Instruction], kind: str) -> float:
    operands = sum(
        a.bytes for n in one.operands if n in instructions for a in results_of(instructions, n)
    )
    if kind in ("reduce-scatter", "all-reduce", "all-to-all", "collective-permute"):
        return operands
    results = sum(array.bytes for array in one.results)
    # A started collective hands on its operands beside its results.
    return results - operands if one.opcode.endswith("-start") else results


def _group_size(rest: str, devices: int) -> int:
    match = _GROUPS.search(rest)
    if match is None:
        return devices
    if match[4] is not None:  # mesh['axis_0'=4,'axis_1'=2] {'axis_1'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[4]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[5]))
    return len(match[1].split(",")) if match[1] else int(match[3])


def _dearest(module: Module, one: Instruction, devices: int) -> str:
    """The branch that moves most: one of them runs, and which is not known."""

    def moved(branch: str) -> float:
        alone = Counts()
        _walk(module, branch, 1.0, alone, devices)
        return alone.bytes

    return max(_branches(one), key=moved)


def _branches(one: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [computation_of(one, "true_computation"), computation_of(one, "false_computation")]

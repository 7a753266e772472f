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

import numpy as np

_SIZES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,<= ]*)\](\{[^{}]*\})?")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([0-9,]+)\}|\[(\d+),(\d+)\]"
    r"|mesh\[([^\]]*)\](?:, device_ids=\S+)? \{(.*?)\})"
)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ASYNC = 'custom_call_target="AsyncCollective'
"""Starts or ends a collective that runs beside fusions."""
_KERNEL = re.compile(r'custom_call_target="([^"]*(?:mosaic|triton|fmha|tpu_custom_call)[^"]*)"')
"""Programs written elsewhere, whose operations the text does not tell."""
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "add-dependency", "opt-barrier",
    "copy-done", "async-done", "async-update", "domain", "iota",
}  # fmt: skip
"""What moves no data by itself."""


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
    """

    flops: float = 0
    bytes: float = 0
    pieces: list[tuple[float, float, float]] = field(default_factory=list)
    collectives: dict[tuple[str, int], Collective] = field(
        default_factory=lambda: defaultdict(Collective)
    )
    unbounded_loops: int = 0
    kernels: set[str] = field(default_factory=set)


def count(text: str, devices: int = 1) -> Counts:
    """Counts a compiled module.

    Args:
        text: `compiled.as_text()`.
        devices: the size of a group that the text leaves open: all of them.
    """
    module = _parse(text)
    counts = Counts()
    entry = next(name for name, (is_entry, _) in module.items() if is_entry)
    _walk(module, entry, 1.0, counts, devices)
    return counts


Module = dict[str, tuple[bool, dict[str, Instruction]]]


def _parse(text: str) -> Module:
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


def _walk(module: Module, name: str, times: float, counts: Counts, devices: int) -> None:
    instructions = module[name][1]
    channels: set[str] = set()
    for one in instructions.values():
        if one.opcode == "while":
            trips = _trips(module, name, one)
            counts.unbounded_loops += trips is None
            runs = times * (1 if trips is None else trips)
            _walk(module, _called(one, "body"), runs, counts, devices)
        elif one.opcode == "call" or (one.opcode == "async-start" and "calls=" in one.rest):
            key = "to_apply" if "to_apply=" in one.rest else "calls"
            _walk(module, _called(one, key), times, counts, devices)
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
    if _is_collective(one):
        _book_collective(instructions, one, times, counts, devices)
        return
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return
    flops = _flops(module, instructions, one)
    moved = _bytes(module, instructions, one)
    counts.flops += times * flops
    counts.bytes += times * moved
    counts.pieces.append((flops, moved, times))
    if one.opcode == "custom-call" and (kernel := _KERNEL.search(one.rest)):
        counts.kernels.add(kernel[1])


def _is_collective(one: Instruction) -> bool:
    return one.opcode.removesuffix("-start") in COLLECTIVES


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
    inner = module[_called(fusion, "calls")][1]
    found = []
    for each in inner.values():
        if each.opcode == "fusion":
            found += _fused_collectives(module, each, channels)
        elif _is_collective(each):
            channel = re.search(r"channel_id=(\d+)", each.rest)
            if channel is not None:
                if channel[1] in channels:
                    continue
                channels.add(channel[1])
            found.append((inner, each))
    return found


def _collective_bytes(one: Instruction, instructions: dict[str, Instruction], kind: str) -> float:
    operands = sum(a.bytes for n in one.operands if n in instructions for a in _of(instructions, n))
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


def _called(one: Instruction, key: str) -> str:
    match = re.search(rf"{key}=%?([\w.\-]+)", one.rest)
    assert match is not None, (key, one.rest[:200])
    return match[1]


def _trips(module: Module, where: str, loop: Instruction) -> int | None:
    """What the compiler knows, or else what the loop's counter is compared with less its start."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
    if known is not None:
        return int(known[1])
    found = _counter(module, loop)
    if found is None:
        return None
    index, end = found
    start, _ = _origin(module, where, loop.operands[0], index)
    if start is not None and start.opcode == "while":
        _, begin = _counter(module, start) or (0, 0)
    else:
        begin = 0 if start is None else _constant(start) or 0
    return max(end - begin, 0)


def _counter(module: Module, loop: Instruction) -> tuple[int, int] | None:
    """Which of the loop's carried values its condition compares with a constant, and the
    constant."""
    pending = [_called(loop, "condition")]
    while pending:
        where = pending.pop()
        for one in module[where][1].values():
            pending += re.findall(r"calls=%?([\w.\-]+)", one.rest)
            if one.opcode != "compare":
                continue
            (left, index), (right, _) = (_origin(module, where, x, None) for x in one.operands)
            end = None if right is None else _constant(right)
            if left is not None and left.opcode == "parameter" and None not in (index, end):
                return index, end  # type: ignore[return-value]
    return None


def _constant(one: Instruction) -> int | None:
    whole = one.opcode == "constant" and one.results[0].dtype == "s32" and one.inner.isdigit()
    return int(one.inner) if whole else None


def _origin(
    module: Module, where: str, name: str, index: int | None
) -> tuple[Instruction | None, int | None]:
    """What makes a value, or the element `index` of a tuple, in computation `where`: seen through
    copies, tuples, calls and into fusions. With the element's index, where it is taken from
    something else, for instance a loop's parameter."""
    while (one := module[where][1].get(name)) is not None:
        if one.opcode == "get-tuple-element" and index is None:
            index = int(re.findall(r"index=(\d+)", one.rest)[0])
            name = one.operands[0]
        elif one.opcode == "tuple" and index is not None:
            name, index = one.operands[index], None
        elif one.opcode == "call":
            where = _called(one, "to_apply")
            name = list(module[where][1])[-1]
        elif one.opcode == "parameter":
            callers = (
                (caller, each.operands[int(one.inner)])
                for caller, (_, instructions) in module.items()
                for each in instructions.values()
                if each.opcode in ("call", "fusion")
                and re.search(rf"(to_apply|calls)=%?{re.escape(where)}(?![\w.\-])", each.rest)
            )
            found = next(callers, None)
            if found is None:
                return one, index
            where, name = found
        elif one.opcode in ("copy", "bitcast", "convert"):
            name = one.operands[0]
        else:
            return one, index
    return None, None


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
    return [_called(one, "true_computation"), _called(one, "false_computation")]


def _of(instructions: dict[str, Instruction], name: str) -> list[Array]:
    return instructions[name].results


def _flops(module: Module, instructions: dict[str, Instruction], one: Instruction) -> float:
    if one.opcode == "dot":
        return _dot_flops(instructions, one)
    if one.opcode == "convolution":
        return _convolution_flops(instructions, one)
    if one.opcode == "fusion":
        inner = module[_called(one, "calls")][1]
        return sum(_flops(module, inner, each) for each in inner.values())
    if one.opcode == "custom-call" and "matmul" in one.rest:
        # Libraries' matrix products [.., M, K] x [.., K, N], written without their dimensions.
        out, left = one.results[0], _of(instructions, one.operands[0])[0]
        rows = math.prod(out.dims[:-1])
        return 2.0 * math.prod(out.dims) * math.prod(left.dims) / max(rows, 1)
    return 0.0


def _dot_flops(instructions: dict[str, Instruction], one: Instruction) -> float:
    left = _of(instructions, one.operands[0])[0]
    contracting = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", one.rest)
    dims = [int(d) for d in contracting[1].split(",") if d] if contracting else []
    return 2.0 * math.prod(one.results[0].dims) * math.prod(left.dims[d] for d in dims)


def _convolution_flops(instructions: dict[str, Instruction], one: Instruction) -> float:
    """Counts the pairs of output and kernel places that meet a real input: a product over batches
    is written as a convolution whose window mostly lies on padding."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.rest)
    assert labels is not None, one.rest[:200]
    left, right = (_of(instructions, name)[0] for name in one.operands[:2])
    out = one.results[0]
    at_left, at_kernel, at_out = labels[1], labels[2], labels[3]
    total = 2.0 * out.dims[at_out.index("b")] * out.dims[at_out.index("f")]
    total *= right.dims[at_kernel.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", one.rest)
    total /= int(groups[1]) if groups else 1
    for number, space in enumerate(sorted(c for c in at_kernel if c.isdigit())):
        total *= _meetings(
            one.rest,
            number,
            left.dims[at_left.index(space)],
            right.dims[at_kernel.index(space)],
            out.dims[at_out.index(space)],
        )
    return total


def _meetings(rest: str, number: int, ins: int, kernel: int, outs: int) -> int:
    window = re.search(r"window=\{([^}]*)\}", rest)
    values = dict(part.split("=") for part in window[1].split()) if window else {}

    def value(key: str, default: str) -> str:
        parts = values.get(key, "").split("x")
        return parts[number] if parts != [""] else default

    stride, low = int(value("stride", "1")), int(value("pad", "0_0").split("_")[0])
    left_dilate, dilate = int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1"))
    places = np.arange(outs)[:, None] * stride + np.arange(kernel)[None, :] * dilate - low
    real = (places >= 0) & (places < (ins - 1) * left_dilate + 1) & (places % left_dilate == 0)
    return int(real.sum())


def _bytes(module: Module, instructions: dict[str, Instruction], one: Instruction) -> float:
    operands = [_of(instructions, name) for name in one.operands if name in instructions]
    read = sum(array.hbm for arrays in operands for array in arrays)
    written = sum(array.hbm for array in one.results)
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return sum(array.bytes for array in one.results) + written
    if one.opcode == "slice-start":  # its results: the operand, the slice, a flag
        return one.results[1].bytes + one.results[1].hbm
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = operands[-1 if one.opcode == "scatter" else 1]
        return 2 * sum(array.hbm for array in update)
    if one.opcode == "copy-start":
        return sum(array.hbm for array in one.results[:2])
    if one.opcode == "fusion":
        return _fusion_bytes(module, one, instructions)
    return read + written


def _fusion_bytes(module: Module, one: Instruction, instructions: dict[str, Instruction]) -> float:
    """A fusion's operands and results; of an operand that is only sliced, the slices, and of one
    that is updated in place, the update."""
    called = _called(one, "calls")
    total, updated = 0.0, 0.0
    for number, name in enumerate(one.operands):
        whole = sum(array.hbm for array in _of(instructions, name)) if name in instructions else 0
        if not whole:
            continue
        parts = _parts(module, called, number)
        if parts is None:
            total += whole
            continue
        read, update = parts
        total += min(whole, read + update)
        if update:
            updated += max(whole - update, 0.0)
    return total + max(_written(module[called][1], one) - updated, 0.0)


def _written(inner: dict[str, Instruction], fusion: Instruction) -> float:
    """Bytes of a fusion's results, without those that it hands through or that a collective
    fills."""
    last = list(inner.values())[-1]
    if last.opcode == "custom-call" and _ASYNC in last.rest:
        return 0.0
    if last.opcode != "tuple" or len(last.operands) != len(fusion.results):
        return sum(array.hbm for array in fusion.results)
    total = 0.0
    for name, array in zip(last.operands, fusion.results, strict=True):
        source = inner.get(name)
        while source is not None and source.opcode == "bitcast":
            source = inner.get(source.operands[0])
        if source is None or not (source.opcode == "parameter" or _is_collective(source)):
            total += array.hbm
    return total


def _parts(module: Module, name: str, number: int) -> tuple[float, float] | None:
    """Bytes that a fused computation slices out of a parameter, and bytes that it updates in it; in
    fusions inside it too. None where it uses the whole; what it only hands on counts as nothing."""
    inner = module[name][1]
    users: dict[str, list[Instruction]] = defaultdict(list)
    for each in inner.values():
        for operand in dict.fromkeys(each.operands):
            users[operand].append(each)
    found = [p for p in inner.values() if p.opcode == "parameter" and int(p.inner) == number]
    uses = _through_bitcasts(found[0], users) if found else []
    if not uses:
        return None
    read, update = 0.0, 0.0
    for source, use in uses:
        if use.opcode in ("dynamic-slice", "gather", "slice"):
            read += use.results[0].bytes
        elif use.opcode == "dynamic-update-slice" and use.operands[0] == source:
            update += sum(array.bytes for array in _of(inner, use.operands[1]))
        elif _is_collective(use) or use.opcode == "tuple" or _ASYNC in use.rest:
            continue
        elif use.opcode == "fusion":
            called = _called(use, "calls")
            for place, operand in enumerate(use.operands):
                parts = _parts(module, called, place) if operand == source else (0.0, 0.0)
                if parts is None:
                    return None
                read, update = read + parts[0], update + parts[1]
        else:
            return None
    return read, update


def _through_bitcasts(
    start: Instruction, users: dict[str, list[Instruction]]
) -> list[tuple[str, Instruction]]:
    """What uses a value, bitcasts aside, and the name under which it does."""
    found: list[tuple[str, Instruction]] = []
    for use in users[start.name]:
        found += _through_bitcasts(use, users) if use.opcode == "bitcast" else [(start.name, use)]
    return found

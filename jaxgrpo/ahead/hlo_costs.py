"""Operations and bytes of one instruction of a compiled module. No jax."""

from __future__ import annotations

import math
import re
from collections import defaultdict

import numpy as np

from jaxgrpo.ahead.hlo_text import (
    ASYNC,
    Instruction,
    Module,
    computation_of,
    is_collective,
    results_of,
)


def flops_of(module: Module, instructions: dict[str, Instruction], one: Instruction) -> float:
    if one.opcode == "dot":
        return _dot_flops(instructions, one)
    if one.opcode == "convolution":
        return _convolution_flops(instructions, one)
    if one.opcode == "fusion":
        inner = module[computation_of(one, "calls")][1]
        return sum(flops_of(module, inner, each) for each in inner.values())
    if one.opcode == "custom-call" and "matmul" in one.rest:
        # Libraries' matrix products [.., M, K] x [.., K, N], written without their dimensions.
        out, left = one.results[0], results_of(instructions, one.operands[0])[0]
        rows = math.prod(out.dims[:-1])
        return 2.0 * math.prod(out.dims) * math.prod(left.dims) / max(rows, 1)
    return 0.0


def _dot_flops(instructions: dict[str, Instruction], one: Instruction) -> float:
    left = results_of(instructions, one.operands[0])[0]
    contracting = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", one.rest)
    dims = [int(d) for d in contracting[1].split(",") if d] if contracting else []
    return 2.0 * math.prod(one.results[0].dims) * math.prod(left.dims[d] for d in dims)


def _convolution_flops(instructions: dict[str, Instruction], one: Instruction) -> float:
    """Counts the pairs of output and kernel places that meet a real input: a product over batches
    is written as a convolution whose window mostly lies on padding."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.rest)
    assert labels is not None, one.rest[:200]
    left, right = (results_of(instructions, name)[0] for name in one.operands[:2])
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


def bytes_of(module: Module, instructions: dict[str, Instruction], one: Instruction) -> float:
    operands = [results_of(instructions, name) for name in one.operands if name in instructions]
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
    called = computation_of(one, "calls")
    total, updated = 0.0, 0.0
    for number, name in enumerate(one.operands):
        whole = (
            sum(array.hbm for array in results_of(instructions, name))
            if name in instructions
            else 0
        )
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
    if last.opcode == "custom-call" and ASYNC in last.rest:
        return 0.0
    if last.opcode != "tuple" or len(last.operands) != len(fusion.results):
        return sum(array.hbm for array in fusion.results)
    total = 0.0
    for name, array in zip(last.operands, fusion.results, strict=True):
        source = inner.get(name)
        while source is not None and source.opcode == "bitcast":
            source = inner.get(source.operands[0])
        if source is None or not (source.opcode == "parameter" or is_collective(source)):
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
            update += sum(array.bytes for array in results_of(inner, use.operands[1]))
        elif is_collective(use) or use.opcode == "tuple" or ASYNC in use.rest:
            continue
        elif use.opcode == "fusion":
            called = computation_of(use, "calls")
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

"""How often the loops of a compiled module run. No jax."""

from __future__ import annotations

import re

from jaxgrpo.ahead.hlo_text import Instruction, Module, computation_of


def trip_count(module: Module, where: str, loop: Instruction) -> int | None:
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
    pending = [computation_of(loop, "condition")]
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
            where = computation_of(one, "to_apply")
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

"""Rows laid out for training without padding, each prompt once for its rows. Host side, numpy.

All that is done token by token (projections, MLP, head) runs on bins of tokens; attention alone
needs rows. `BinShape` fixes what is compiled, from the settings alone; how many bins a step fills
is an argument of the compiled loop. `bins.py` goes from bins to rows and back.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from jaxgrpo.types import Packing, PromptBatch

NOWHERE = -1
"""A place or row that is padding."""

ROOM = {"gpu": 4.0, "cpu": 2.5, "tpu": 2.5}
"""Rows that a bin has room for, over those that fill it when all reach the cap: bins get full as
long as completions take at least 1/ROOM of the cap on average. cuDNN's attention passes over rows
that are not there; elsewhere they cost what real ones do."""


@dataclass(frozen=True)
class BinShape:
    """The shape of a step's bins.

    Attributes:
        bins: that no lengths can exceed.
        places, rows: of a bin.
        row_places: of the longest row with its prompt.
        shared_places: for prompts.
        group_size: rows that a prompt may be shared by.
    """

    bins: int
    places: int
    rows: int
    row_places: int
    shared_places: int
    group_size: int


def bin_shape(
    prompts: int,
    group_size: int,
    prompt_slots: int,
    width: int,
    micro_batches: int,
    platform: str,
) -> BinShape:
    """For so many prompts of up to `prompt_slots` tokens with `group_size` completions of up to
    `width` each, on devices of a platform: a step in which nothing ends early takes about
    `micro_batches` bins."""
    rows, shared = prompts * group_size, prompt_slots - 1
    row_places = _in_eights(shared + width)
    longest = prompts * shared + rows * width
    places = max(_in_eights(-(-longest // micro_batches)), row_places)
    full = places / (shared / group_size + width)
    bin_rows = min(rows, math.ceil(ROOM[platform] * full))
    # What prompts take when completions have half of the cap on average, and half as much again.
    share = 1.5 * shared / max(shared + group_size * width / 2, 1)
    shared_places = min(places, max(_in_eights(math.ceil(share * places)), _in_eights(shared)))
    shape = BinShape(rows, places, bin_rows, row_places, shared_places, group_size)
    return dataclasses.replace(shape, bins=_most_bins(shape, prompts, shared, width))


def _most_bins(shape: BinShape, prompts: int, shared: int, width: int) -> int:
    """Bins that `_fill` needs at most, whatever the lengths are.

    Every bin but the last turned a row away, for one of three reasons: it has all its rows; or it
    is full, fewer than shared + width places being left; or it is neither, and has no room for
    another prompt. Take a prompt when all its rows are placed: it lies in at most one bin that is
    neither full nor has all its rows. Of two, it would have entered the later one with a row that
    the earlier one turned away, and not for its places or rows: so for want of room for the prompt,
    which then never entered there. Hence in all bins of the third kind, and in full ones before the
    prompt that filled them up, each prompt lies once: prompts * shared places together. A bin of
    the third kind has at least `crowded` of those. A full one holds at least `full` places of these
    and of rows' own, of which there are rows * width: what the prompt that filled it up takes,
    which may lie elsewhere too, does not count.
    """
    rows = prompts * shape.group_size
    full = shape.places - 2 * shared - width + 1
    crowded = shape.shared_places - shared + 1
    if full < 1:
        return rows
    least = min(full, crowded)
    # In whole numbers: rows * width / full + prompts * shared / least.
    needed = (rows * width * least + prompts * shared * full) // (full * least)
    return min(rows, 1 + rows // shape.rows + needed)


def _in_eights(count: int) -> int:
    return -(-count // 8) * 8


def pack_rows(
    prompts: PromptBatch,
    completions: np.ndarray,
    lengths: np.ndarray,
    trained: np.ndarray,
    *,
    micro_batches: int,
    shards: int,
    platform: str,
) -> tuple[np.ndarray, Packing]:
    """(order, packing): the rows' new order, and the packing of rows in that order.

    Args:
        completions: [B, C], as many of each prompt.
        lengths: tokens of each completion, at least 1.
        trained: [B], rows to be computed; the others are in no bin.
        micro_batches, shards: over how many bins and batch shards full rows are spread.
        platform: of the devices.
    """
    count, width = len(prompts.texts), completions.shape[1]
    group_size = len(lengths) // count
    shape = bin_shape(
        count // shards, group_size, prompts.tokens.shape[1], width, micro_batches, platform
    )
    prompt_lengths = prompts.mask.sum(axis=1)
    places = np.where(trained, lengths, 0).reshape(count, group_size).sum(axis=1)
    dealt = _deal(places, shards)
    filled = [
        _fill(shape, prompt_lengths, lengths, trained, members, group_size) for members in dealt
    ]
    used = max(len(bins) for bins in filled)
    arrays = _empty(shards, shape)
    for shard, bins in enumerate(filled):
        for number, rows in enumerate(bins):
            inside = {name: values[shard, number] for name, values in arrays.items()}
            _write(inside, rows, prompts, prompt_lengths, completions, lengths, group_size)
    order = np.concatenate([_rows_of(members, group_size) for members in dealt])
    # Rows were written by their old numbers; a shard knows its own, from 0 on.
    new = np.empty(len(order), np.int32)
    new[order] = np.arange(len(order)) % (len(order) // shards)
    member = arrays["member"]
    arrays["member"] = np.where(member >= 0, new[np.maximum(member, 0)], NOWHERE)
    return order, Packing(
        count=np.int32(used),  # type: ignore[arg-type]
        **arrays,  # type: ignore[arg-type]
        row_places=shape.row_places,
        shared_places=shape.shared_places,
        group_size=group_size,
    )


def packing_shapes(shape: BinShape, shards: int) -> dict[str, tuple[tuple[int, int, int], type]]:
    """Shape and dtype of each of a packing's arrays."""
    by_place = (shards, shape.bins, shape.places)
    by_row = (shards, shape.bins, shape.rows)
    return {
        "tokens": (by_place, np.int32),
        "positions": (by_place, np.int32),
        "targets": (by_place, np.int32),
        "row": (by_place, np.int32),
        "shared": (by_place, np.bool_),
        "member": (by_row, np.int32),
        "prompt": (by_row, np.int32),
        "prompt_tokens": (by_row, np.int32),
        "first": (by_row, np.int32),
        "length": (by_row, np.int32),
        "sharers": (by_row, np.int32),
    }


def _empty(shards: int, shape: BinShape) -> dict[str, np.ndarray]:
    # Zeros cost nothing where nothing is written, as in most bins.
    arrays = {
        name: np.zeros(*described) for name, described in packing_shapes(shape, shards).items()
    }
    for name in ("row", "member"):
        arrays[name].fill(NOWHERE)
    return arrays


def _rows_of(members: np.ndarray, group_size: int) -> np.ndarray:
    return (members[:, None] * group_size + np.arange(group_size)[None, :]).reshape(-1)


def _deal(places: np.ndarray, shards: int) -> list[np.ndarray]:
    """Prompts of each shard, equally many: the longest first, each to the emptiest with room."""
    room = len(places) // shards
    members: list[list[int]] = [[] for _ in range(shards)]
    load = np.zeros(shards)
    for prompt in np.argsort(-places, kind="stable"):
        open_shards = [i for i in range(shards) if len(members[i]) < room]
        chosen = min(open_shards, key=lambda i: load[i])
        members[chosen].append(int(prompt))
        load[chosen] += places[prompt]
    return [np.array(sorted(inside)) for inside in members]


class _Bin:
    """A bin being filled: what room is left, and its rows by prompt."""

    def __init__(self, shape: BinShape) -> None:
        self.places, self.rows, self.shared = shape.places, shape.rows, shape.shared_places
        self.inside: dict[int, list[int]] = {}

    def take(self, prompt: int, row: int, shared: int, own: int) -> bool:
        """Puts the row in if it fits, with its prompt if that is not there yet."""
        shared = 0 if prompt in self.inside else shared
        if self.places < shared + own or self.rows < 1 or self.shared < shared:
            return False
        self.places -= shared + own
        self.shared -= shared
        self.rows -= 1
        self.inside.setdefault(prompt, []).append(row)
        return True


def _fill(
    shape: BinShape,
    prompt_lengths: np.ndarray,
    lengths: np.ndarray,
    trained: np.ndarray,
    members: np.ndarray,
    group_size: int,
) -> list[dict[int, list[int]]]:
    """prompt -> rows of each bin: the longest groups first, and of a group the longest rows, each
    into the first bin that has room. So that a group is rarely split, and small rows fill up."""
    rows = _rows_of(members, group_size)
    own = np.where(trained[rows], lengths[rows], 0).reshape(len(members), group_size)
    bins: list[_Bin] = []
    for place in range(len(members)):
        prompt = int(members[place])
        shared = int(prompt_lengths[prompt]) - 1
        for within in np.argsort(-own[place], kind="stable").tolist():
            tokens = int(own[place, within])
            if tokens == 0:
                continue
            row = prompt * group_size + within
            if not any(bin_.take(prompt, row, shared, tokens) for bin_ in bins):
                bins.append(_Bin(shape))
                assert bins[-1].take(prompt, row, shared, tokens), (shape, shared, tokens)
    assert len(bins) <= shape.bins, (len(bins), shape)
    return [{prompt: sorted(rows) for prompt, rows in bin_.inside.items()} for bin_ in bins]


def _write(
    arrays: dict[str, np.ndarray],
    inside: dict[int, list[int]],
    prompts: PromptBatch,
    prompt_lengths: np.ndarray,
    completions: np.ndarray,
    lengths: np.ndarray,
    group_size: int,
) -> None:
    """Fills one bin: prompts first, so that they lie in its front, then the rows' own places."""
    tokens, positions, targets, row_of, shared = (
        arrays[name] for name in ("tokens", "positions", "targets", "row", "shared")
    )
    at = number = 0
    starts = {}
    slots = prompts.tokens.shape[1]
    for prompt, rows in inside.items():
        length = int(prompt_lengths[prompt]) - 1
        after = at + length
        tokens[at:after] = prompts.tokens[prompt, slots - length - 1 : slots - 1]
        positions[at:after] = np.arange(length)
        row_of[at:after] = number
        shared[at:after] = True
        arrays["sharers"][number] = len(rows)
        starts[prompt] = (at, length)
        at, number = after, number + len(rows)
    number = 0
    for prompt, rows in inside.items():
        start, length = starts[prompt]
        for row in rows:
            own = int(lengths[row])
            after = at + own
            tokens[at] = prompts.tokens[prompt, -1]
            tokens[at + 1 : after] = completions[row, : own - 1]
            targets[at:after] = completions[row, :own]
            positions[at:after] = np.arange(length, length + own)
            row_of[at:after] = number
            for name, value in (
                ("member", row),
                ("prompt", start),
                ("prompt_tokens", length),
                ("first", at),
                ("length", own),
            ):
                arrays[name][number] = value
            at, number = after, number + 1

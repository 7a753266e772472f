"""Rows laid out for training without padding, each prompt once for its group. Host side, numpy.

All that is done token by token (projections, MLP, head) runs on flat bins of tokens; attention
alone needs rows. The maps from one to the other are made here; `bins.py` follows them.
One bin per micro-batch and batch shard: prompts are dealt out so that bins are about equally full.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from jaxgrpo.types import Packing

NOWHERE = -1
"""In a map: this place corresponds to none."""


def pack_rows(
    tokens: np.ndarray,
    prompt_lengths: np.ndarray,
    completion_tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    group_size: int,
    micro_batches: int,
    shards: int,
    sizes: int,
) -> tuple[np.ndarray, Packing] | None:
    """(order, packing): the rows' new order, and the maps for rows in that order.

    Args:
        tokens: [B, T], each row prompt, completion, padding; groups side by side, prompts equal.
        lengths: completion tokens of each row.
        micro_batches, shards: what `split_rows` and the mesh make of the rows.
        sizes: how many bin sizes there may be; each is another program to compile.

    Returns:
        None if whole groups do not divide over micro-batches and shards.
    """
    rows, length = tokens.shape
    width = completion_tokens.shape[1]
    bins, prompts = micro_batches * shards, rows // group_size
    if prompts % bins:
        return None
    dealt = _deal(prompt_lengths, lengths, group_size, bins)
    order = np.empty(rows, np.int64)
    for i, members in enumerate(dealt):
        # Bin i is micro-batch i % M of shard i // M; split_rows gives micro-batch m rows m::M.
        shard, micro = divmod(i, micro_batches)
        inside = (members[:, None] * group_size + np.arange(group_size)[None, :]).reshape(-1)
        places = shard * len(inside) + np.arange(len(inside))
        order[places * micro_batches + micro] = inside
    used = [_layout(prompt_lengths, lengths, group_size, members) for members in dealt]
    prompts_per_bin = prompts // bins
    capacity, most = bin_capacity(prompts_per_bin, group_size, length - width, width)
    size = _bucket(max(bin_used for bin_used, _ in used), capacity, sizes)
    longest = max(int(lengths[_rows_of(m, group_size)].sum()) for m in dealt)
    scored = _bucket(longest, most, sizes)
    arrays = _empty(bins, size, scored, rows, length, width)
    for i, (members, (_, offsets)) in enumerate(zip(dealt, used, strict=True)):
        shard, micro = divmod(i, micro_batches)
        local = _rows_of(members, group_size)
        places = (shard * len(local) + np.arange(len(local))) * micro_batches + micro
        _fill_bin(
            arrays, i, places, local, offsets, tokens, prompt_lengths, completion_tokens, lengths,
            group_size,
        )  # fmt: skip
    return order, Packing(**cast(Any, arrays), group_size=group_size)


def bin_capacity(prompts: int, group_size: int, prompt: int, width: int) -> tuple[int, int]:
    """Tokens, and completion tokens among them, of a bin in which nothing ends early."""
    return prompts * (prompt + group_size * width), prompts * group_size * width


def _deal(
    prompt_lengths: np.ndarray, lengths: np.ndarray, group_size: int, bins: int
) -> list[np.ndarray]:
    """Prompts of each bin, equally many: the longest first, each to the emptiest bin with room."""
    totals = prompt_lengths[::group_size] + lengths.reshape(-1, group_size).sum(axis=1)
    room = len(totals) // bins
    members: list[list[int]] = [[] for _ in range(bins)]
    load = np.zeros(bins)
    for prompt in np.argsort(-totals, kind="stable"):
        open_bins = [i for i in range(bins) if len(members[i]) < room]
        chosen = min(open_bins, key=lambda i: load[i])
        members[chosen].append(int(prompt))
        load[chosen] += totals[prompt]
    return [np.array(sorted(inside)) for inside in members]


def _rows_of(members: np.ndarray, group_size: int) -> np.ndarray:
    return (members[:, None] * group_size + np.arange(group_size)[None, :]).reshape(-1)


def _layout(
    prompt_lengths: np.ndarray, lengths: np.ndarray, group_size: int, members: np.ndarray
) -> tuple[int, np.ndarray]:
    """Tokens in the bin, and (prompt, completion) offsets of each of its rows."""
    offsets, at = [], 0
    for prompt in members.tolist():
        start, at = at, at + int(prompt_lengths[prompt * group_size])
        for own in lengths[prompt * group_size : (prompt + 1) * group_size].tolist():
            offsets.append((start, at))
            at += own
    return at, np.array(offsets)


def _bucket(used: int, capacity: int, sizes: int) -> int:
    """The smallest of `sizes` sizes up to `capacity` that holds `used`."""
    step = -(-capacity // sizes)
    return min(capacity, -(-used // step) * step)


def _empty(
    bins: int, size: int, scored: int, rows: int, length: int, width: int
) -> dict[str, np.ndarray]:
    flat, row = (bins, size), (rows, length)
    return {
        "tokens": np.zeros(flat, np.int32),
        "positions": np.zeros(flat, np.int32),
        "shared": np.zeros(flat, bool),
        "source": np.full(flat, NOWHERE, np.int32),
        "rows": np.zeros(row, np.int32),
        "owned": np.full(row, NOWHERE, np.int32),
        "scored": np.full((bins, scored), NOWHERE, np.int32),
        "targets": np.zeros((bins, scored), np.int32),
        "predicts": np.full(row, NOWHERE, np.int32),
        "place": np.full((bins, scored), NOWHERE, np.int32),
        "slot": np.full((rows, width), NOWHERE, np.int32),
    }


def _fill_bin(
    arrays: dict[str, np.ndarray],
    i: int,
    places: np.ndarray,
    local: np.ndarray,
    offsets: np.ndarray,
    tokens: np.ndarray,
    prompt_lengths: np.ndarray,
    completion_tokens: np.ndarray,
    lengths: np.ndarray,
    group_size: int,
) -> None:
    """Writes the maps of bin i: `local` are its rows' old numbers, `places` their new ones.

    All that is written is a slice of consecutive numbers or of tokens, which numpy copies in a
    fraction of the time that it looks up places one by one.
    """
    length, width = tokens.shape[1], completion_tokens.shape[1]
    count = np.arange(max(arrays["tokens"].shape[1], len(local) * length) + 1, dtype=np.int32)
    rows, owned, predicts, slot = (arrays[n] for n in ("rows", "owned", "predicts", "slot"))
    source, flat, positions, shared, scored, targets, place_of = (
        arrays[name][i]
        for name in ("source", "tokens", "positions", "shared", "scored", "targets", "place")
    )
    done = 0
    described = zip(
        places.tolist(),
        local.tolist(),
        offsets.tolist(),
        prompt_lengths[local].tolist(),
        lengths[local].tolist(),
        strict=True,
    )
    for j, (place, row, (start, first), prompt, own) in enumerate(described):
        end, last, base = prompt + own, first + own, j * length
        rows[place, :prompt] = count[start : start + prompt]
        rows[place, prompt:end] = owned[place, prompt:end] = count[first:last]
        source[first:last] = count[base + prompt : base + end]
        flat[first:last] = tokens[row, prompt:end]
        positions[first:last] = count[prompt:end]
        # The group's first row stands for all of them where the prompt's values are concerned.
        if j % group_size == 0:
            after = start + prompt
            owned[place, :prompt] = count[start:after]
            source[start:after] = count[base : base + prompt]
            flat[start:after] = tokens[row, :prompt]
            positions[start:after] = count[:prompt]
            shared[start:after] = True
        # The token before predicts.
        scored[done : done + own] = count[base + prompt - 1 : base + end - 1]
        predicts[place, prompt - 1 : end - 1] = count[done : done + own]
        targets[done : done + own] = completion_tokens[row, :own]
        place_of[done : done + own] = count[j * width : j * width + own]
        slot[place, :own] = count[done : done + own]
        done += own

"""Every trained row lies in one bin, whole; bins never outgrow what is compiled, and are full."""

import numpy as np
import pytest

from jaxgrpo.model.pack_rows import NOWHERE, bin_shape, pack_rows
from tests.rows import make_rows, random_rows


def pack(rows, trained=None, *, micro_batches=4, shards=1, platform="gpu"):
    trained = np.ones(len(rows.lengths), bool) if trained is None else trained
    return pack_rows(
        rows.prompts, rows.completions, rows.lengths, trained,
        micro_batches=micro_batches, shards=shards, platform=platform,
    )  # fmt: skip


def check_packing(rows, trained, micro_batches, shards):
    """All that a packing promises, place by place."""
    count, slots = rows.prompts.tokens.shape
    total, width = rows.completions.shape
    order, packing = pack(rows, trained, micro_batches=micro_batches, shards=shards)
    shape = bin_shape(count // shards, rows.group_size, slots, width, micro_batches, "gpu")
    assert packing.tokens.shape == (shards, shape.bins, shape.places)
    assert packing.member.shape == (shards, shape.bins, shape.rows)
    assert sorted(order) == list(range(total))
    assert packing.count <= shape.bins
    assert (packing.row[:, packing.count :] == NOWHERE).all()
    assert (packing.member[:, packing.count :] == NOWHERE).all()
    whole, starts, _ = rows.whole
    found = []
    for shard in range(shards):
        for b in range(packing.count):
            tokens, positions, targets, row_of, shared = (
                getattr(packing, name)[shard, b]
                for name in ("tokens", "positions", "targets", "row", "shared")
            )
            unclaimed = row_of >= 0
            assert not shared[shape.shared_places :].any()
            # A place of a prompt names the first of the rows that share it; those that follow.
            sharers = packing.sharers[shard, b]
            led = 0
            for r, member in enumerate(packing.member[shard, b]):
                if member == NOWHERE:
                    assert sharers[r] == packing.length[shard, b, r] == 0
                    continue
                old = order[shard * (total // shards) + member]
                found.append(old)
                prompt, held, first, length = (
                    int(getattr(packing, name)[shard, b, r])
                    for name in ("prompt", "prompt_tokens", "first", "length")
                )
                assert (held, length) == (starts[old] - 1, rows.lengths[old])
                ours = np.r_[prompt : prompt + held, first : first + length]
                np.testing.assert_array_equal(tokens[ours], whole[old, : held + length])
                np.testing.assert_array_equal(positions[ours], np.arange(held + length))
                np.testing.assert_array_equal(targets[ours[held:]], rows.completions[old, :length])
                assert (row_of[ours[held:]] == r).all() and not shared[ours[held:]].any()
                if sharers[r]:
                    assert led == 0, "the one before still leads"
                    led, leader = int(sharers[r]), r
                assert led > 0 and (row_of[ours[:held]] == leader).all()
                assert shared[ours[:held]].all()
                led -= 1
                assert unclaimed[ours[held:]].all(), "two rows have one place of their own"
                unclaimed[ours] = False
            assert led == 0 and not unclaimed.any()
    assert sorted(found) == np.flatnonzero(trained).tolist()


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("seed", range(12))
def test_trained_rows_are_packed_once_and_whole(seed, shards):
    rng = np.random.default_rng([seed, shards])
    slots, width, group = (int(rng.integers(1, high)) for high in (13, 17, 7))
    prompts = shards * int(rng.integers(1, 5))
    rows = random_rows(rng, 50, prompts, group, slots, width)
    trained = rng.random(prompts * group) < rng.choice([0.2, 0.6, 1.0])
    check_packing(rows, trained, int(rng.integers(1, prompts * group + 3)), shards)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("prompt", [1, 9])
@pytest.mark.parametrize("completion", [1, 16])
@pytest.mark.parametrize("micro_batches", [1, 5, 40])
def test_extreme_lengths_are_packed_too(completion, prompt, micro_batches, shards):
    prompts, group = 4, 5
    asked = np.random.default_rng(0).integers(0, 50, (prompts, prompt))
    completions = np.random.default_rng(1).integers(0, 50, (prompts * group, 16))
    lengths = np.full(prompts * group, completion)
    rows = make_rows(list(asked), completions, lengths, group, slots=9)
    check_packing(rows, np.ones(prompts * group, bool), micro_batches, shards)


@pytest.mark.parametrize("group", [1, 8])
def test_one_group_and_no_rows(group):
    rows = random_rows(np.random.default_rng(0), 50, 1, group, 6, 10)
    check_packing(rows, np.ones(group, bool), 4, 1)
    check_packing(rows, np.zeros(group, bool), 4, 1)
    assert pack(rows, np.zeros(group, bool))[1].count == 0


def test_no_lengths_exceed_the_bins():
    """Lengths of prompts and completions, short and long ones mixed in every proportion, changed a
    few at a time and kept where they need as many bins or more. That the bins hold them is
    asserted inside."""
    rng = np.random.default_rng(0)

    def draw(count, high):
        short = rng.integers(1, high + 1, count)
        return np.where(rng.random(count) < rng.random(), high, short)

    for _ in range(60):
        prompts, group = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        slots, width = int(rng.integers(1, 30)), int(rng.integers(1, 40))
        total = prompts * group
        micro_batches = int(rng.integers(1, total + 2))
        kept, needed = [draw(prompts, slots), draw(total, width)], 0
        for _ in range(15):
            changed = [lengths.copy() for lengths in kept]
            for lengths, high in zip(changed, (slots, width), strict=True):
                lengths[rng.integers(len(lengths), size=2)] = rng.integers(1, high + 1, 2)
            asked = [np.ones(length, int) for length in changed[0]]
            rows = make_rows(asked, np.ones((total, width)), changed[1], group, slots)
            _, packing = pack(rows, micro_batches=micro_batches)
            assert (packing.member >= 0).sum() == total
            if packing.count >= needed:
                kept, needed = changed, packing.count


def test_there_are_not_many_more_bins_than_full_rows_fill():
    """All of them are copied to the device, whatever is in them."""
    for micro_batches in (1, 4, 8, 16, 24, 32):
        shape = bin_shape(32, 8, 256, 512, micro_batches, "gpu")
        assert shape.bins <= 2 * micro_batches + 1, shape


def test_when_nothing_ends_early_about_as_many_bins_run_as_were_asked_for():
    for micro_batches in (1, 4, 8, 16, 24, 32):
        rows = gsm8k_like(np.random.default_rng(0), lengths=np.full(256, 512), prompts=256)
        _, packing = pack(rows, micro_batches=micro_batches)
        assert micro_batches <= packing.count <= 1.15 * micro_batches + 1, micro_batches


def gsm8k_like(rng, lengths=None, prompts=None):
    """32 prompts of 60 to 250 tokens (105 on average) with 8 completions each, of log-normal
    lengths (220 on average) that end at 512."""
    if prompts is None:
        asked = np.clip(rng.lognormal(np.log(101), 0.33, 32), 60, 250).astype(int)
    else:
        asked = np.full(32, prompts)
    if lengths is None:
        lengths = np.clip(rng.lognormal(np.log(205), 0.45, 256), 1, 512).astype(int)
    completions = rng.integers(0, 50, (256, 512))
    return make_rows([np.ones(n, int) for n in asked], completions, lengths, 8, slots=256)


def padding_of(packing):
    filled = (packing.row >= 0).sum()
    return 1 - filled / (packing.count * packing.tokens.shape[0] * packing.tokens.shape[2])


def test_at_most_8_percent_of_the_places_are_padding_at_lengths_like_gsm8ks():
    """Mean over 20 steps of places without a token over all places that run."""
    steps = [gsm8k_like(np.random.default_rng(seed)) for seed in range(20)]
    assert abs(np.mean([rows.prompts.mask.sum(axis=1) for rows in steps]) - 105) < 3
    assert abs(np.mean([rows.lengths for rows in steps]) - 220) < 5
    found = [padding_of(pack(rows, micro_batches=24)[1]) for rows in steps]
    assert np.mean(found) <= 0.08, found


def test_shards_get_about_as_many_tokens_each():
    rows = gsm8k_like(np.random.default_rng(0))
    _, packing = pack(rows, micro_batches=4, shards=4)
    used = (packing.row >= 0).sum(axis=(1, 2))
    assert used.max() <= 1.1 * used.mean()

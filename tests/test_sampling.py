"""Sampling: right distribution, right log-prob, transformers' kept sets, independent noise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jaxgrpo.config import RolloutConfig
from jaxgrpo.devices import ONE_CPU
from jaxgrpo.model.block_statistics import (
    block_statistics,
    block_sums,
    kernel_statistics,
    row_statistics,
)
from jaxgrpo.rollout.sampling import (
    draws_needed,
    inverse_cdf,
    keep,
    row_draws,
    row_keys,
    sample,
)

RNG = np.random.default_rng(0)


def _draws(logits, rows, t=0, key=0, **cuts):
    keys, count = row_keys(jax.random.key(key), rows), draws_needed(cuts.get("top_p", 1.0))
    draws = row_draws(keys, jnp.array([t]), count)[0]
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits)))
    more = lambda number: row_draws(keys, (1000 * number + t)[None], count)[0]  # noqa: E731
    draw = jax.jit(lambda logits: sample(logits, draws, more, RolloutConfig(**cuts)))
    return draw(logits)


@pytest.mark.parametrize("vocab", [5, 256, 300, 1031])
def test_frequencies_follow_the_distribution(vocab):
    logits = RNG.normal(size=vocab) * 2
    rows = 40_000
    tokens, _ = _draws(logits, rows, temperature=0.8)
    p = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    likely = p * rows > 5
    chi2 = ((counts - p * rows) ** 2 / (p * rows))[likely].sum()
    # Mean n, variance 2n: five standard deviations.
    n = likely.sum()
    assert chi2 < n + 5 * np.sqrt(2 * n)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9])
def test_the_nucleus_is_drawn_by_its_own_distribution(top_p):
    """By rejection, and yet the frequencies of the renormalised kept set."""
    logits = RNG.normal(size=300).astype(np.float32) * 2
    rows = 40_000
    tokens, _ = _draws(logits, rows, temperature=1.0, top_p=top_p)
    kept = np.asarray(keep(jnp.asarray(logits)[None], top_k=0, top_p=top_p, min_p=0.0))[0]
    p = np.exp(kept) / np.exp(kept).sum()
    counts = np.bincount(np.asarray(tokens), minlength=300)
    assert not counts[p == 0].any()
    likely = p * rows > 5
    n = likely.sum()
    chi2 = ((counts - p * rows) ** 2 / np.maximum(p * rows, 1e-9))[likely].sum()
    assert chi2 <= n + 5 * np.sqrt(2 * n)


def test_logprobs_are_of_the_whole_vocabulary_under_the_temperature():
    logits = RNG.normal(size=50) * 3
    for cuts in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}):
        tokens, logprobs = _draws(logits, 64, temperature=0.7, **cuts)
        want = torch.log_softmax(torch.tensor(logits / 0.7, dtype=torch.float32), -1).numpy()
        chex.assert_trees_all_close(np.asarray(logprobs), want[np.asarray(tokens)], atol=1e-5)


def test_temperature_zero_takes_the_likeliest():
    logits = RNG.normal(size=50) * 3
    tokens, logprobs = _draws(logits, 4, temperature=0.0)
    want = torch.log_softmax(torch.tensor(logits, dtype=torch.float32), -1).numpy()
    assert (np.asarray(tokens) == logits.argmax()).all()
    chex.assert_trees_all_close(np.asarray(logprobs), np.full(4, want.max()), atol=1e-5)


@pytest.mark.parametrize(
    ("cuts", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_k": 1000}, TopKLogitsWarper(1000)),
        ({"top_p": 0.9}, TopPLogitsWarper(0.9)),
        ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_kept_sets_are_transformers(cuts, warper):
    logits = RNG.normal(size=(64, 97)).astype(np.float32) * 3
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    ours = np.isfinite(np.asarray(keep(jnp.asarray(logits), **(off | cuts))))
    theirs = np.isfinite(warper(None, torch.tensor(logits)).numpy())
    np.testing.assert_array_equal(ours, theirs)
    assert ours.any(axis=1).all()


def test_cuts_apply_in_transformers_order():
    logits = RNG.normal(size=(64, 97)).astype(np.float32) * 2
    ours = keep(jnp.asarray(logits), top_k=20, top_p=0.8, min_p=0.2)
    theirs = torch.tensor(logits)
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.2)):
        theirs = warper(None, theirs)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))


@pytest.mark.parametrize("draw", [0.0, 1e-9, 0.5, 1 - 2**-24, 1.0])
def test_a_token_of_probability_zero_is_never_drawn(draw):
    for allowed in ([0], [255], [256], [999], [3, 700]):
        scores = np.full((1, 1000), -np.inf, np.float32)
        scores[0, allowed] = 0.0
        scores = jnp.asarray(scores)
        top = jnp.max(scores, axis=-1)
        draws = jnp.asarray([draw], jnp.float32)
        token = inverse_cdf(scores, top, block_sums(scores, top), draws)
        assert int(token[0]) in allowed


def test_full_vocabulary_of_qwen_draws_every_region():
    tokens, _ = _draws(np.zeros(151936), 2048, temperature=1.0)
    counts = np.bincount(np.asarray(tokens) // 15194, minlength=10)
    assert counts.min() > 2048 / 10 * 0.6


def test_noise_differs_between_tokens_rows_and_keys_but_repeats_for_the_same():
    logits = np.zeros(100_000)
    first, _ = _draws(logits, 64, t=0, temperature=1.0)
    again, _ = _draws(logits, 64, t=0, temperature=1.0)
    np.testing.assert_array_equal(first, again)
    assert len(set(np.asarray(first).tolist())) == 64
    for other in ({"t": 1}, {"key": 1}):
        tokens, _ = _draws(logits, 64, temperature=1.0, **other)
        assert not np.any(np.asarray(first) == np.asarray(tokens))


def test_a_row_does_not_depend_on_how_many_there_are():
    logits = RNG.normal(size=500)
    few, _ = _draws(logits, 8, temperature=1.0)
    many, _ = _draws(logits, 32, temperature=1.0)
    np.testing.assert_array_equal(few, np.asarray(many)[:8])


@pytest.mark.parametrize("blocks", [5, 32, 33])
def test_the_kernel_of_block_statistics_computes_what_two_passes_do(blocks):
    logits = RNG.normal(size=(3, 128 * blocks)).astype(np.float32) * 8
    logits[1, :256] = -np.inf
    top, sums, _ = kernel_statistics(jnp.asarray(logits), 0.7, entropy=False, interpret=True)
    want = block_statistics(jnp.asarray(logits), 0.7, ONE_CPU)
    chex.assert_trees_all_close((top, sums), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("blocks", [5, 32, 33])
def test_the_kernel_computes_the_entropys_sum_too(blocks):
    logits = jnp.asarray(RNG.normal(size=(3, 128 * blocks)).astype(np.float32) * 8)
    top, sums, moments = kernel_statistics(logits, 0.7, entropy=True, interpret=True)
    got = (top, sums.sum(axis=1), moments.sum(axis=1))
    chex.assert_trees_all_close(got, row_statistics(logits, 0.7, ONE_CPU), rtol=5e-6, atol=1e-5)

"""Greedy completions against transformers.generate, 64 left-padded prompts, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgrpo.config import RolloutConfig
from jaxgrpo.model.api import make_decode_weights
from jaxgrpo.model.weights import load_model
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules
from tests.hf_models import FAMILIES, make_hf_model

PROMPTS, SLOTS, WIDTH, EOS = 64, 15, 24, 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_greedy_tokens_equal_transformers_generate(tmp_path, tie, family):
    theirs = make_hf_model(
        tmp_path, family, tie=tie, layers=3, hidden=96, heads=6, kv_heads=2, vocab=40
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 40, (PROMPTS, SLOTS))
    mask = np.arange(SLOTS)[None, :] >= SLOTS - rng.integers(1, SLOTS + 1, PROMPTS)[:, None]
    tokens = np.where(mask, tokens, 0)
    with torch.no_grad():
        want = theirs.generate(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            max_new_tokens=WIDTH,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )[:, SLOTS:].numpy()
    want = np.pad(want, ((0, 0), (0, WIDTH - want.shape[1])))
    config, base = load_model(tmp_path, "float32")
    rollout = RolloutConfig(max_completion_tokens=WIDTH, temperature=0.0)
    generate = make_generate(config, rollout, StopRules((EOS,)), 1)
    weights = make_decode_weights(config, base, None)
    ours = generate(weights, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(ours.tokens), want)
    assert len({tuple(row) for row in want.tolist()}) > 1
    assert (want == EOS).any()

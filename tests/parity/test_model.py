"""Our model against transformers' Qwen2 and Qwen3, float32, on checkpoints made with them."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxgrpo.model.api import hidden_states, logits, make_decode_weights, prefill
from jaxgrpo.model.weights import load_model
from tests.hf_models import FAMILIES, make_hf_model

TOLERANCE = 1e-4  # max abs difference of float32 logits


def _hf_logits(path, tokens, mask=None):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        kwargs = {}
        if mask is not None:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            kwargs["position_ids"] = torch.tensor(positions)
            kwargs["attention_mask"] = torch.tensor(mask.astype(np.int64))
        return model(input_ids=torch.tensor(tokens), **kwargs).logits.numpy()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(7, 1), (14, 2), (12, 2), (4, 4)], ids=["7:1", "14:2", "6:1", "1:1"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(tmp_path, family, tie, heads, kv_heads):
    make_hf_model(
        tmp_path, family, tie=tie, hidden=heads * 16, heads=heads, kv_heads=kv_heads, layers=3
    )
    config, base = load_model(tmp_path, "float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 17))
    ours = logits(config, base, hidden_states(config, base, None, jnp.asarray(tokens)))
    chex.assert_trees_all_close(
        np.asarray(ours), _hf_logits(tmp_path, tokens), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers_with_left_padding(tmp_path, family):
    make_hf_model(tmp_path, family, tie=True, hidden=96, heads=6, kv_heads=1, layers=3)
    config, base = load_model(tmp_path, "float32")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (4, 13))
    mask = np.arange(13)[None, :] >= np.array([0, 3, 7, 12])[:, None]
    theirs = _hf_logits(tmp_path, tokens, mask)
    hidden = hidden_states(config, base, None, jnp.asarray(tokens), jnp.asarray(mask))
    ours = np.asarray(logits(config, base, hidden))
    chex.assert_trees_all_close(ours[mask], theirs[mask], atol=TOLERANCE, rtol=0)
    weights = make_decode_weights(config, base, None)
    last, _ = prefill(config, weights, jnp.asarray(tokens), jnp.asarray(mask))
    ours = np.asarray(logits(config, weights, last))
    chex.assert_trees_all_close(ours, theirs[:, -1], atol=TOLERANCE, rtol=0)


def test_heads_of_a_size_of_their_own_are_qwen2s_too(tmp_path):
    make_hf_model(tmp_path, "qwen2", tie=True, head_dim=24)
    config, base = load_model(tmp_path, "float32")
    assert config.qkv_bias and config.num_heads * config.head_dim > config.hidden_size
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    ours = logits(config, base, hidden_states(config, base, None, jnp.asarray(tokens)))
    chex.assert_trees_all_close(
        np.asarray(ours), _hf_logits(tmp_path, tokens), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_checkpoint_equals_single_file(tmp_path, family):
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    make_hf_model(single, family, tie=False)
    model = AutoModelForCausalLM.from_pretrained(single, dtype=torch.float32)
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    chex.assert_trees_all_equal(load_model(single, "float32")[1], load_model(sharded, "float32")[1])


def test_bfloat16_checkpoint_loads_exactly(tmp_path):
    make_hf_model(tmp_path, tie=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    _, base = load_model(tmp_path / "bf16", "bfloat16")
    assert base["embed_tokens"].dtype == jnp.bfloat16
    theirs = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(base["embed_tokens"], np.float32), theirs)

"""Our masked LoRA against PEFT's, with a rank that differs per layer and module, float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jaxgrpo.config import MODULES
from jaxgrpo.model.adapters import save_adapter
from jaxgrpo.model.api import bin_logprobs, device_plan, init_lora
from jaxgrpo.model.bins import completions_from_bins, put_rows, take_bin
from jaxgrpo.model.weights import hf_module, load_model
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.types import Adapters
from tests.hf_models import make_hf_model
from tests.rows import make_rows, on_device, train_batch

RTOL = 1e-4  # relative to the largest entry of each array
LAYERS, PROMPT, WIDTH = 12, 5, 7  # more than ten layers: "layers.1" must not reach layer 11


def _plan(scale_rule, modules, layers=LAYERS, scaled=False):
    rng = np.random.default_rng(3)
    ranks = {module: rng.integers(0, 6, layers) for module in modules}
    ranks["q_proj"][1], ranks["q_proj"][11] = 5, 2
    factors = {module: rng.uniform(0.3, 3, layers) for module in ranks} if scaled else None
    return RankPlan(ranks, 7, 12.0, scale_rule, reference_rank=4, scale_factors=factors)


def _torch_logprobs(model, tokens, temperature):
    logits = model(input_ids=torch.tensor(tokens)).logits[:, PROMPT - 1 : -1] / temperature
    targets = torch.tensor(tokens[:, PROMPT:])
    return torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]


SIX = tuple(module for module in MODULES if module != "k_proj")


@pytest.mark.parametrize(
    ("family", "scale_rule", "scaled", "modules"),
    [
        ("qwen2", "constant", False, SIX),
        ("qwen2", "rslora", False, SIX),
        ("qwen2", "alpha_over_r", False, SIX),
        ("qwen2", "constant", True, MODULES),
        ("qwen3", "rslora", False, SIX),
        ("qwen3", "constant", True, MODULES),
    ],
)
def test_logprobs_and_gradients_match_peft(tmp_path, family, scale_rule, scaled, modules):
    make_hf_model(tmp_path / "base", family, tie=True, layers=LAYERS)
    config, base = load_model(tmp_path / "base", "float32")
    plan = _plan(scale_rule, modules, scaled=scaled)
    lora = init_lora(config, plan, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), lora)
    save_adapter(tmp_path / "adapter", lora, plan, str(tmp_path / "base"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (3, PROMPT + WIDTH))
    weights = rng.normal(size=(3, WIDTH)).astype(np.float32)
    rows = make_rows(list(tokens[:, :PROMPT]), tokens[:, PROMPT:], [WIDTH] * 3, 1, PROMPT)
    packing = on_device(train_batch(rows, advantages=np.ones(3))).packing
    assert packing.count == 1

    def ours(lora):
        only = take_bin(packing, jnp.int32(0))
        found, _ = bin_logprobs(
            config,
            base,
            Adapters(lora, device_plan(plan)),
            only,
            temperature=0.7,
            chunk_tokens=8,
            remat="full",
        )
        by_bin_row = completions_from_bins(found, only, WIDTH)
        logprobs = put_rows(jnp.zeros((3, WIDTH)), by_bin_row, only)
        return jnp.sum(logprobs * weights), logprobs

    (_, logprobs), grads = jax.value_and_grad(ours, has_aux=True)(lora)
    their_logprobs = _torch_logprobs(theirs, tokens, 0.7)
    chex.assert_trees_all_close(
        np.asarray(logprobs), their_logprobs.detach().numpy(), rtol=RTOL, atol=0
    )
    (their_logprobs * torch.tensor(weights)).sum().backward()
    their_grads = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    # The file's B holds B * (s / s_max); the chain rule puts that factor on the gradient.
    scales = plan.scales()
    largest = max(float(s.max()) for s in scales.values())
    checked = 0
    for module in plan.modules:
        for layer, r in enumerate(plan.ranks[module]):
            name = f"base_model.model.model.layers.{layer}.{hf_module(module)}"
            if r == 0:
                assert f"{name}.lora_A.default.weight" not in their_grads
                continue
            factor = float(scales[module][layer]) / largest
            a = np.asarray(grads[module]["a"][layer][:, :r]).T
            b = np.asarray(grads[module]["b"][layer][:r]).T
            for mine, key, scale in ((a, "lora_A", 1.0), (b, "lora_B", factor)):
                want = their_grads[f"{name}.{key}.default.weight"] * scale
                atol = RTOL * np.abs(want).max()
                chex.assert_trees_all_close(mine, want, rtol=0, atol=atol)
                checked += 1
    assert checked == 2 * sum(int((r > 0).sum()) for r in plan.ranks.values())


def test_initialisation_is_pefts(tmp_path):
    make_hf_model(tmp_path, tie=True)
    config, _ = load_model(tmp_path, "float32")
    plan = RankPlan({"q_proj": np.array([64, 64])}, 64, 1.0, "constant", 64)
    lora = init_lora(config, plan, jax.random.key(0))
    # Kaiming uniform with a = sqrt(5), as torch draws it for lora_A [r, in].
    want = torch.nn.init.kaiming_uniform_(torch.empty(4096, config.hidden_size), a=5**0.5)
    a = np.asarray(lora["q_proj"]["a"])
    assert np.abs(a).max() <= float(want.abs().max()) * 1.001
    np.testing.assert_allclose(a.std(), float(want.std()), rtol=0.02)
    assert not np.asarray(lora["q_proj"]["b"]).any()

"""The gradient norm of the frozen weights against torch autograd on unfrozen ones, float32."""

import itertools

import chex
import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jaxgrpo.config import MODULES, GrpoConfig
from jaxgrpo.grpo.layer_grad_norms import layer_grad_norms
from jaxgrpo.grpo.step import StepSettings, make_gradients
from jaxgrpo.model.adapters import save_adapter
from jaxgrpo.model.api import device_plan, init_lora
from jaxgrpo.model.weights import hf_module, load_model
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.types import Adapters
from tests.hf_models import make_hf_model
from tests.rows import make_rows, on_device, train_batch

RTOL = 1e-4
LAYERS, ROWS, PROMPT, WIDTH, TEMPERATURE = 3, 4, 5, 6, 0.8


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    """Our model of a family and adapters, and transformers' with the same and every weight
    trainable."""
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path / "base", request.param, tie=True, layers=LAYERS)
    config, base = load_model(path / "base", "float32")
    ranks = {m: np.array([2, 0, 3]) for m in MODULES}
    plan = RankPlan(ranks, max_rank=4, alpha=4.0, scale_rule="rslora", reference_rank=2)
    lora = init_lora(config, plan, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), lora)
    save_adapter(path / "adapter", lora, plan, str(path / "base"))
    theirs = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, path / "adapter", is_trainable=True)
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    return config, base, plan, lora, theirs


LENGTHS = (6, 3, 5, 1)
ADVANTAGES = np.array([1.0, -0.5, 0.25, 2.0], np.float32)


def make_tokens(config):
    """Every row with a prompt of its own."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, PROMPT + WIDTH))


def make_batch(config, micro_batches=1):
    tokens = make_tokens(config)
    rows = make_rows(list(tokens[:, :PROMPT]), tokens[:, PROMPT:], LENGTHS, 1, PROMPT)
    return on_device(train_batch(rows, micro_batches=micro_batches, advantages=ADVANTAGES))


def torch_loss(model, tokens, objective):
    tokens = torch.tensor(tokens)
    logits = model(input_ids=tokens).logits[:, PROMPT - 1 : -1] / TEMPERATURE
    picked = torch.log_softmax(logits, -1).gather(-1, tokens[:, PROMPT:, None])[..., 0]
    mask = torch.arange(WIDTH)[None, :] < torch.tensor(LENGTHS)[:, None]
    if objective == "sft":
        return -(picked * mask).sum() / mask.sum()
    ratio = torch.exp(picked - picked.detach())
    advantages = torch.tensor(ADVANTAGES)[:, None]
    return -(ratio * advantages * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("models", "objective", "micro_batches"),
    [
        *itertools.product(["qwen2"], ["grpo", "sft"], [1, 2]),
        ("qwen3", "grpo", 2),
    ],
    indirect=["models"],
)
def test_equals_torchs_weight_gradient(models, objective, micro_batches):
    config, base, plan, lora, theirs = models
    grpo = GrpoConfig(
        loss="dapo",
        prompts_per_step=1,
        group_size=ROWS,
        importance_correction="none",
        logprob_chunk_tokens=4,
    )
    gradients = jax.jit(
        make_gradients(config, StepSettings(grpo, TEMPERATURE, WIDTH, "full", objective, True))
    )
    batch = make_batch(config, micro_batches)
    assert batch.packing.count == micro_batches
    loss, grads, kernel_grads, _, _ = gradients(base, Adapters(lora, device_plan(plan)), batch)
    theirs.zero_grad()
    their_loss = torch_loss(theirs, make_tokens(config), objective)
    their_loss.backward()
    chex.assert_trees_all_close(float(loss), their_loss.item(), rtol=RTOL)
    norms = layer_grad_norms(grads, device_plan(plan), kernel_grads)["weight"]
    parameters = dict(theirs.named_parameters())
    for module in MODULES:
        for layer in range(LAYERS):
            name = f"base_model.model.model.layers.{layer}.{hf_module(module)}"
            wrapped = parameters.get(f"{name}.base_layer.weight")
            weight = wrapped if wrapped is not None else parameters[f"{name}.weight"]
            chex.assert_trees_all_close(
                float(norms[module]["w"][layer]), weight.grad.norm().item(), rtol=RTOL
            )
            chex.assert_trees_all_close(
                np.asarray(kernel_grads[module][layer]).T,
                weight.grad.numpy(),
                atol=RTOL * float(weight.grad.abs().max()),
            )


@pytest.mark.parametrize("models", ["qwen2"], indirect=True)
def test_adapter_gradients_follow_from_it(models):
    """dL/dB = scale * A^T dL/dW, and dL/dA = scale * dL/dW B^T: what makes the view rank-free."""
    config, base, plan, lora, _ = models
    grpo = GrpoConfig(prompts_per_step=1, group_size=ROWS)
    settings = StepSettings(grpo, TEMPERATURE, WIDTH, "none", "sft", True)
    gradients = make_gradients(config, settings)
    adapters = Adapters(lora, device_plan(plan))
    _, grads, kernel_grads, _, _ = gradients(base, adapters, make_batch(config))
    for module in MODULES:
        masks, scales = plan.masks()[module], plan.scales()[module]
        a, b = (np.asarray(lora[module][side]) for side in ("a", "b"))
        weight = np.asarray(kernel_grads[module])
        for side, expected in (
            ("a", np.einsum("lio,lro->lir", weight, b) * masks[:, None, :]),
            ("b", np.einsum("lir,lio->lro", a, weight) * masks[:, :, None]),
        ):
            expected = expected * scales[:, None, None]
            chex.assert_trees_all_close(
                np.asarray(grads[module][side]), expected, atol=RTOL * np.abs(expected).max()
            )

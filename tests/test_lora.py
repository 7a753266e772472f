"""Masked variable-rank LoRA: what masking, merging and the scale rules must mean."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import MODULES
from jaxgrpo.model.api import (
    QwenConfig,
    device_plan,
    hidden_states,
    init_base,
    init_lora,
    logits,
    make_decode_weights,
    prefill,
)
from jaxgrpo.model.lora import plan_collection
from jaxgrpo.model.qwen import Qwen
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.types import Adapters
from tests.gradients import assert_close_in_size

CONFIG = QwenConfig(61, 48, 80, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=8)
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 9))


def _plan(seed=0, max_rank=8, rule="rslora"):
    rng = np.random.default_rng(seed)
    ranks = {module: rng.integers(0, 6, CONFIG.num_layers) for module in MODULES}
    return RankPlan(ranks, max_rank, 8.0, rule, 4)


def _noisy(lora, seed=1):
    """B away from zero, as after training."""
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


@functools.cache
def _base():
    return init_base(CONFIG, jax.random.key(7))


@jax.jit
def _logits(base, adapters):
    hidden = hidden_states(CONFIG, base, adapters, jnp.asarray(TOKENS))
    return logits(CONFIG, base, hidden)


def _output(lora, plan):
    return _logits(_base(), Adapters(lora, device_plan(plan)))


def test_masked_plan_equals_separate_lora_of_those_ranks():
    """Every layer's masked adapter is the dense LoRA of exactly its rank, merged by hand."""
    plan = _plan()
    base = _base()
    lora = _noisy(init_lora(CONFIG, plan, jax.random.key(0)))
    merged = dict(base["layers"])
    for module in MODULES:
        kernels = np.asarray(base["layers"][module]["kernel"], np.float64).copy()
        for layer, r in enumerate(plan.ranks[module]):
            a = np.asarray(lora[module]["a"][layer][:, :r], np.float64)
            b = np.asarray(lora[module]["b"][layer][:r], np.float64)
            if r:
                kernels[layer] += 8.0 / np.sqrt(r) * (a @ b)
        merged[module] = {**merged[module], "kernel": jnp.asarray(kernels, jnp.float32)}
    by_hand = {**base, "layers": merged}
    want = _logits(by_hand, None)
    chex.assert_trees_all_close(_output(lora, plan), want, atol=2e-5, rtol=0)


def test_output_does_not_depend_on_max_rank_or_on_masked_entries():
    plan, wide = _plan(max_rank=5), _plan(max_rank=16)
    lora = _noisy(init_lora(CONFIG, plan, jax.random.key(0)))
    wide_lora = _noisy(init_lora(CONFIG, wide, jax.random.key(0)), seed=5)
    for module in MODULES:  # same ranks in use, other values in the padding
        for layer, r in enumerate(plan.ranks[module]):
            a, b = wide_lora[module]["a"], wide_lora[module]["b"]
            a = a.at[layer, :, :r].set(lora[module]["a"][layer, :, :r])
            b = b.at[layer, :r].set(lora[module]["b"][layer, :r])
            wide_lora[module] = {"a": a, "b": b}
    chex.assert_trees_all_close(_output(lora, plan), _output(wide_lora, wide), atol=1e-5, rtol=0)


def test_initial_values_of_a_rank_do_not_depend_on_max_rank():
    narrow = init_lora(CONFIG, _plan(max_rank=5), jax.random.key(0))
    wide = init_lora(CONFIG, _plan(max_rank=16), jax.random.key(0))
    for module in MODULES:
        chex.assert_trees_all_equal(narrow[module]["a"], wide[module]["a"][:, :, :5])


def test_fresh_adapter_changes_nothing():
    plan = _plan()
    fresh = _output(init_lora(CONFIG, plan, jax.random.key(0)), plan)
    chex.assert_trees_all_equal(fresh, _logits(_base(), None))


def test_masked_entries_get_no_gradient():
    plan = _plan()
    lora = _noisy(init_lora(CONFIG, plan, jax.random.key(0)))
    grads = jax.grad(lambda lora: jnp.sum(_output(lora, plan) ** 2))(lora)
    for module, mask in plan.masks().items():
        assert np.all(np.asarray(grads[module]["a"]) * (1 - mask[:, None, :]) == 0)
        assert np.all(np.asarray(grads[module]["b"]) * (1 - mask[:, :, None]) == 0)
        for layer, r in enumerate(plan.ranks[module]):
            assert (np.abs(grads[module]["a"][layer]).sum() > 0) == (r > 0)


def test_with_b_zero_the_gradient_of_a_is_exactly_zero():
    plan = _plan()
    lora = init_lora(CONFIG, plan, jax.random.key(0))
    grads = jax.grad(lambda lora: jnp.sum(_output(lora, plan) ** 2))(lora)
    for module in MODULES:
        assert not np.asarray(grads[module]["a"]).any()
        assert np.asarray(grads[module]["b"]).any()


@pytest.mark.parametrize("rule", ["constant", "rslora", "alpha_over_r"])
def test_the_sampler_carries_scale_times_a_times_b(rule):
    """Its output is that of weights to which the update was added in float32 (1e-5)."""
    plan = _plan(rule=rule)
    base = init_base(CONFIG, jax.random.key(7))
    lora = _noisy(init_lora(CONFIG, plan, jax.random.key(0)))
    factor = {
        "constant": lambda r: 8 / 4,
        "rslora": lambda r: 8 / r**0.5,
        "alpha_over_r": lambda r: 8 / r,
    }[rule]
    layers = dict(base["layers"])
    for module, ab in lora.items():
        updates = [
            factor(int(r)) * (a[:, :r] @ b[:r]) if r else jnp.zeros((a.shape[0], b.shape[1]))
            for r, a, b in zip(plan.ranks[module], ab["a"], ab["b"], strict=True)
        ]
        kernel = layers[module]["kernel"] + jnp.stack(updates)
        layers[module] = {**layers[module], "kernel": kernel}
    mask = jnp.ones(TOKENS.shape, bool)
    outputs = [
        prefill(CONFIG, weights, jnp.asarray(TOKENS), mask)[0]
        for weights in (
            make_decode_weights(CONFIG, base, Adapters(lora, device_plan(plan))),
            make_decode_weights(CONFIG, {**base, "layers": layers}, None),
        )
    ]
    chex.assert_trees_all_close(*outputs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("remat", ["none", "products"])
def test_layers_that_are_written_out_compute_what_the_loop_does(monkeypatch, remat):
    """Outputs, and gradients by adapters and kernels, within 1e-5 of their size: XLA adds a layer's
    terms in another order in a loop."""
    adapters = Adapters(_noisy(init_lora(CONFIG, _plan(), jax.random.key(2))), device_plan(_plan()))
    tokens = jnp.asarray(TOKENS)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(lora, kernels):
        layers = {
            name: leaves | kernels.get(name, {}) for name, leaves in _base()["layers"].items()
        }
        plan = {"layers": plan_collection(adapters.plan)}
        variables = {"params": _base() | {"layers": layers}, "lora": {"layers": lora}, "plan": plan}
        hidden: Any = Qwen(CONFIG, remat).apply(variables, tokens, positions, None)
        return jnp.mean(jnp.sin(hidden)), hidden

    def found():
        by = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        kernels = {name: {"kernel": _base()["layers"][name]["kernel"]} for name in MODULES}
        return jax.jit(by)(adapters.lora, kernels)

    in_a_loop = found()
    monkeypatch.setattr("jaxgrpo.model.qwen.unroll_layers", lambda *_: True)
    assert_close_in_size(found(), in_a_loop)

"""Adapters out to PEFT, vLLM and transformers, and back in from PEFT; float32."""

import copy
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxgrpo.config import MODULES, ConfigError, RolloutConfig
from jaxgrpo.model.adapters import adapter_from_lora, save_adapter, stack_adapter
from jaxgrpo.model.api import (
    device_plan,
    hidden_states,
    init_lora,
    logits,
    make_decode_weights,
)
from jaxgrpo.model.merged import save_merged
from jaxgrpo.model.peft_files import read_peft, write_peft
from jaxgrpo.model.weights import hf_module, load_model
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.types import Adapters
from tests.hf_models import FAMILIES, make_hf_model

LAYERS, TOLERANCE = 11, 1e-5  # more than ten layers: "layers.1" must not reach layer 10


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """Directory, transformers' model of a family, our config and weights."""
    path = tmp_path_factory.mktemp("base")
    theirs = make_hf_model(path, request.param, tie=True, layers=LAYERS, std=0.1)
    return path, theirs, *load_model(path, "float32")


KINDS = ("uniform", "per-layer", "per-module", "rank-0")


def _ranks(kind):
    rng = np.random.default_rng(7)
    if kind == "uniform":
        return {module: np.full(LAYERS, 4) for module in MODULES}
    if kind == "per-layer":
        return dict.fromkeys(MODULES, rng.integers(1, 6, LAYERS))
    if kind == "per-module":
        return {module: rng.integers(1, 6, LAYERS) for module in MODULES}
    ranks = {module: rng.integers(0, 4, LAYERS) for module in MODULES[:5]}
    ranks["k_proj"][:] = 0
    return ranks


def _plan(kind, rule):
    return RankPlan(_ranks(kind), max_rank=6, alpha=3.0, scale_rule=rule, reference_rank=4)


def _lora(config, plan):
    lora = init_lora(config, plan, jax.random.key(0))
    # The padding is not zero either: what is off the plan must not be exported.
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), lora)


def _our_deltas(lora, plan):
    """Name -> scale * (a * mask) b, transposed as Hugging Face has it, in float64."""
    deltas = {}
    for module in plan.modules:
        a, b = (np.asarray(lora[module][side], np.float64) for side in "ab")
        a = a * plan.masks()[module][:, None, :]
        for layer in range(LAYERS):
            delta = plan.scales()[module][layer] * (a[layer] @ b[layer])
            deltas[f"model.layers.{layer}.{hf_module(module)}"] = delta.T
    return deltas


def _vllm_deltas(directory):
    """vLLM's rule: one scale lora_alpha / r for every module, patterns ignored."""
    config = json.loads((directory / "adapter_config.json").read_text())
    assert not config["use_rslora"] and config["modules_to_save"] is None
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(directory / "adapter_model.safetensors")
    deltas = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            assert a.shape[0] <= config["r"]
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            deltas[name] = b.astype(np.float64) * scale @ a
    return deltas


def _merged_state(theirs, directory):
    model = PeftModel.from_pretrained(copy.deepcopy(theirs), directory)
    return model.merge_and_unload().eval()


def of(family, *columns):
    """Every combination of the columns, on a model of the family."""
    return itertools.product([family], *columns)


on_qwen2 = pytest.mark.parametrize("base", ["qwen2"], indirect=True)
on_both = pytest.mark.parametrize("base", FAMILIES, indirect=True)


@pytest.mark.parametrize(
    ("base", "kind", "rule"),
    [
        *of("qwen2", KINDS, ["constant", "rslora", "alpha_over_r"]),
        *of("qwen3", KINDS, ["rslora"]),
    ],
    indirect=["base"],
)
def test_peft_and_vllm_see_our_weights(base, tmp_path, kind, rule):
    path, theirs, config, weights = base
    plan = _plan(kind, rule)
    lora = _lora(config, plan)
    save_adapter(tmp_path / "peft", lora, plan, str(path))
    write_peft(tmp_path / "uniform", adapter_from_lora(lora, plan, str(path)), uniform_rank=True)
    ours = _our_deltas(lora, plan)
    merged = _merged_state(theirs, tmp_path / "peft")
    state, original = merged.state_dict(), theirs.state_dict()
    vllm = {form: _vllm_deltas(tmp_path / form) for form in ("peft", "uniform")}
    assert vllm["uniform"].keys() == ours.keys()
    assert vllm["peft"].keys() == {n for n, d in ours.items() if d.any()}
    for name, delta in ours.items():
        found = (state[f"{name}.weight"] - original[f"{name}.weight"]).numpy()
        np.testing.assert_allclose(found, delta, rtol=0, atol=TOLERANCE)
        for deltas in vllm.values():
            np.testing.assert_allclose(deltas.get(name, 0 * delta), delta, rtol=0, atol=TOLERANCE)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    hidden = hidden_states(config, weights, Adapters(lora, device_plan(plan)), jnp.asarray(tokens))
    with torch.no_grad():
        want = merged(input_ids=torch.tensor(tokens)).logits.numpy()
    # Relative to the largest logit: float32 sums in another order over eleven layers.
    found = np.asarray(logits(config, weights, hidden))
    np.testing.assert_allclose(found, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@on_qwen2
def test_uniform_rank_loads_in_peft(base, tmp_path):
    path, theirs, config, _ = base
    plan = _plan("rank-0", "rslora")
    adapter = adapter_from_lora(_lora(config, plan), plan, str(path))
    write_peft(tmp_path / "patterns", adapter)
    write_peft(tmp_path / "uniform", adapter, uniform_rank=True)
    one, other = (_merged_state(theirs, tmp_path / n).state_dict() for n in ("patterns", "uniform"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


def _peft_adapter(theirs, directory, seed):
    """An adapter made by PEFT with a random rank for every module it reaches."""
    rng = np.random.default_rng(seed)
    modules = [str(m) for m in rng.choice(MODULES, rng.integers(1, 8), replace=False)]
    names = [f"model.layers.{i}.{hf_module(m)}" for i in range(LAYERS) for m in modules]
    chosen = [str(n) for n in rng.choice(names, len(names) // 2 + 1, replace=False)]
    model = get_peft_model(
        copy.deepcopy(theirs),
        LoraConfig(
            r=int(rng.integers(1, 9)),
            lora_alpha=int(rng.integers(1, 33)),
            target_modules=modules,
            rank_pattern={re.escape(name): int(rng.integers(1, 9)) for name in chosen},
            alpha_pattern={re.escape(n): int(rng.integers(1, 33)) for n in chosen[::2]},
            use_rslora=bool(rng.integers(2)),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    model.save_pretrained(directory)


@pytest.mark.parametrize(
    ("base", "seed"), [*of("qwen2", range(4)), ("qwen3", 4), ("qwen3", 5)], indirect=["base"]
)
def test_pefts_adapters_come_in_and_go_out_as_themselves(base, tmp_path, seed):
    path, theirs, config, _ = base
    _peft_adapter(theirs, tmp_path / "theirs", seed)
    adapter = read_peft(tmp_path / "theirs")
    stacked = stack_adapter(adapter, config, "theirs")
    plan = RankPlan(stacked.ranks, adapter.max_rank + 2, 5.0, "rslora", 4)
    # Trained a while or not, what the adapter adds to the weights is what came in.
    lora = stacked.start(init_lora(config, plan, jax.random.key(3)), plan)
    save_adapter(tmp_path / "ours", lora, plan, str(path))
    one, other = (_merged_state(theirs, tmp_path / n).state_dict() for n in ("theirs", "ours"))
    assert any((one[n] != theirs.state_dict()[n]).any() for n in one)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
    # Written by us, an adapter comes back to the bit.
    write_peft(tmp_path / "again", read_peft(tmp_path / "ours"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


@pytest.mark.parametrize(
    ("base", "rule", "shard_bytes"),
    [*of("qwen2", ["constant", "rslora"], [2**30, 60_000]), ("qwen3", "rslora", 60_000)],
    indirect=["base"],
)
def test_merged_model_completes_in_transformers_as_our_sampler_does(
    base, tmp_path, shard_bytes, rule
):
    path, _, config, weights = base
    plan = _plan("rank-0", rule)
    lora = _lora(config, plan)
    (path / "generation_config.json").write_text('{"eos_token_id": 1, "pad_token_id": 0}')
    save_merged(
        tmp_path, adapter_from_lora(lora, plan, ""), path, config, max_shard_bytes=shard_bytes
    )
    files = {file.name for file in tmp_path.iterdir()}
    assert ("model.safetensors.index.json" in files) == (shard_bytes < 2**30)
    assert not [name for name in files if name.startswith(".")]
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (8, 6))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs.generate(input_ids=torch.tensor(tokens), max_new_tokens=16, do_sample=False)[
            :, 6:
        ].numpy()
    want = np.pad(want, ((0, 0), (0, 16 - want.shape[1])))
    generate = make_generate(
        config, RolloutConfig(max_completion_tokens=16, temperature=0.0), StopRules((1,)), 1
    )
    ours = generate(
        make_decode_weights(config, weights, Adapters(lora, device_plan(plan))),
        jnp.asarray(tokens, jnp.int32),
        jnp.ones(tokens.shape, bool),
        jax.random.key(0),
    )
    np.testing.assert_array_equal(np.asarray(ours.tokens), want)
    # And it is a model directory of ours again.
    again, reloaded = load_model(tmp_path, "float32")
    assert again == config
    kernel = np.asarray(reloaded["layers"]["q_proj"]["kernel"])
    assert (kernel != np.asarray(weights["layers"]["q_proj"]["kernel"])).any()


@on_both
def test_merged_bfloat16_is_the_float32_sum_rounded_once(base, tmp_path):
    path, _, _, _ = base
    config, weights = load_model(path, "bfloat16")
    plan = _plan("per-layer", "constant")
    lora = _lora(config, plan)
    save_merged(tmp_path, adapter_from_lora(lora, plan, ""), path, config)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    _, merged = load_model(tmp_path, "bfloat16")
    kernels = merged["layers"]["down_proj"]["kernel"].astype(jnp.float32)
    masks, scales = plan.masks()["down_proj"], plan.scales()["down_proj"]
    for layer in range(LAYERS):
        a, b = (lora["down_proj"][side][layer] for side in ("a", "b"))
        kernel = weights["layers"]["down_proj"]["kernel"][layer].astype(jnp.float32)
        want = kernel + scales[layer] * ((a * masks[layer][None, :]) @ b)
        want = want.astype(jnp.bfloat16).astype(jnp.float32)
        # One unit of bfloat16 where the float32 sums differ in their last bit.
        np.testing.assert_allclose(kernels[layer], want, rtol=2**-7, atol=0)
        assert (kernels[layer] == want).mean() > 0.999


@on_qwen2
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
    ],
)
def test_what_is_more_than_lora_is_refused_with_the_reason(base, tmp_path, changes, message):
    _, theirs, config, _ = base
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes
    get_peft_model(copy.deepcopy(theirs), LoraConfig(**settings)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        stack_adapter(read_peft(tmp_path), config, str(tmp_path))
    assert "\n" not in str(caught.value)

"""What FIM-LoRA, GoRA and EVA measure, against the step's own norms and transformers' inputs."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console

from jaxgrpo.config import MODULES
from jaxgrpo.config_files import load_config
from jaxgrpo.grpo.step import init_train_state
from jaxgrpo.iteration import run_step
from jaxgrpo.model.api import input_moments
from jaxgrpo.model.weights import hf_module, load_model
from jaxgrpo.run import EMBEDDED_CONFIG
from jaxgrpo.study.calibrate import calibrate, explained_variance
from jaxgrpo.study.lab import Lab
from tests.hf_models import make_hf_model

OVERRIDES = [
    "grpo.prompts_per_step=8",
    "grpo.group_size=4",
    "grpo.micro_batches=1",
    "lora.rank=4",
    "rollout.max_completion_tokens=24",
    "weight_grad_norms=true",
]


@pytest.fixture(scope="module")
def measured():
    """One calibration batch, and the first training step on the same prompts and completions."""
    config = load_config([EMBEDDED_CONFIG], OVERRIDES)
    lab = Lab(config, Console(quiet=True))
    session = lab.session
    found = calibrate(lab, batches=1, components=6, objective="grpo")
    programs = lab.programs(session)
    with jax.set_mesh(session.mesh):
        state = init_train_state(session.init_lora(), programs.optimizer)
        _, result = run_step(session, programs, state, 0)
    return found, result.layer_grad_norms, session


def test_fim_is_the_mean_squared_gradient_of_b(measured):
    found, norms, _ = measured
    for module, values in found["fim"].items():
        assert max(values) > 0
        np.testing.assert_allclose(values, np.square(norms["rms"][module]["b"]), rtol=1e-4)


def test_gora_is_bounded_by_the_norms_it_is_made_of(measured):
    """mean|W G| <= ||W|| ||G|| / (in out) (Cauchy-Schwarz), and of that size."""
    found, norms, session = measured
    for module, values in found["gora"].items():
        kernel = np.asarray(session.base["layers"][module]["kernel"], np.float64)
        size = np.sqrt(np.square(kernel).sum(axis=(1, 2))) / kernel[0].size
        bound = size * np.asarray(norms["weight"][module]["w"])
        assert (np.asarray(values) <= bound * (1 + 1e-5)).all()
        assert (np.asarray(values) > 0.2 * bound).all()


def test_modules_of_one_input_have_one_explained_variance(measured):
    found = measured[0]["eva"]
    assert np.shape(found["q_proj"]) == (8, 6)
    for same in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for module in same[1:]:
            np.testing.assert_allclose(found[module], found[same[0]], rtol=1e-5)
    for values in found.values():
        assert (np.diff(values) <= 1e-9).all() and (np.sum(values, axis=1) <= 1 + 1e-6).all()


def test_input_moments_match_what_transformers_feeds_each_projection(tmp_path):
    """Inputs recorded by hooks on the real model; real tokens only. Tolerance 1e-4 relative."""
    theirs = make_hf_model(tmp_path, tie=True, layers=2)
    config, base = load_model(tmp_path, "float32")
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, config.vocab_size, (3, 7))
    mask = np.arange(7) < np.array([[7], [4], [1]])
    inputs: dict[tuple[str, int], torch.Tensor] = {}

    def hook(key):
        def record(_, args):
            inputs[key] = args[0].detach()

        return record

    for layer in range(2):
        for module in MODULES:
            projection = theirs.get_submodule(f"model.layers.{layer}.{hf_module(module)}")
            projection.register_forward_pre_hook(hook((module, layer)))
    with torch.no_grad():
        theirs(input_ids=torch.tensor(tokens))
    found = input_moments(config, base, jnp.asarray(tokens), jnp.asarray(mask))
    for (module, layer), x in inputs.items():
        rows = x.numpy()[mask].astype(np.float64)
        chex.assert_trees_all_close(
            {name: np.asarray(found[module][name][layer], np.float64) for name in ("sum", "outer")},
            {"sum": rows.sum(0), "outer": rows.T @ rows},
            rtol=1e-4,
            atol=1e-4,
        )
        moments = {**jax.tree.map(lambda m, i=layer: m[i : i + 1], found[module]), "count": 12}
        covariance = np.cov(rows.T, bias=True)
        expected = np.sort(np.linalg.eigvalsh(covariance))[::-1][:3] / np.trace(covariance)
        np.testing.assert_allclose(explained_variance(moments, 3)[0], expected, rtol=1e-3)


@pytest.mark.parametrize("inputs", [300, 40])
def test_the_largest_eigenvalues_are_found_without_the_others(inputs):
    """Against all of LAPACK's, for eigenvalues that fall as slowly as 1 / rank; within 1e-3."""
    rng = np.random.default_rng(0)
    turned, _ = np.linalg.qr(rng.normal(size=(inputs, inputs)))
    x = rng.normal(size=(2000, inputs)) / np.sqrt(np.arange(1, inputs + 1)) @ turned.T + 1
    moments = {"sum": x.sum(0)[None], "outer": (x.T @ x)[None], "count": len(x)}
    covariance = np.cov(x.T, bias=True)
    expected = np.linalg.eigvalsh(covariance)[::-1][:32] / np.trace(covariance)
    found = explained_variance(jax.tree.map(jnp.float32, moments), 32)
    np.testing.assert_allclose(found[0], expected, rtol=1e-3)

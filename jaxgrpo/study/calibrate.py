"""What FIM-LoRA, GoRA and EVA measure: a few batches at fresh adapters, nothing updated."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.config import Objective
from jaxgrpo.grpo.advantages import compared_rewards, compute_advantages
from jaxgrpo.grpo.step import StepSettings, make_gradients
from jaxgrpo.iteration import sample_rollout, score
from jaxgrpo.mesh import shard_rows
from jaxgrpo.model.api import input_moments
from jaxgrpo.programs import Programs
from jaxgrpo.session import Session
from jaxgrpo.study.lab import Lab
from jaxgrpo.tasks.data import train_rows
from jaxgrpo.tasks.texts import completion_texts
from jaxgrpo.train_batches import gold_rollout, make_train_batch
from jaxgrpo.types import PromptBatch, Rollout, TrainBatch, Tree

ITERATIONS = 16
"""Of the search for the largest eigenvalues."""


def calibrate(
    lab: Lab, batches: int, components: int, objective: Objective
) -> dict[str, dict[str, list]]:
    """method -> module -> importances, over the first `batches` batches of the run.

    fim: mean over batches and entries of B's squared gradient (arXiv 2605.16800), [L]. Under sft
    the empirical Fisher information of batches; under grpo the second moment of the
    advantage-weighted gradient, which is no Fisher information: a batch whose answers are all right
    or all wrong adds nothing to it.
    gora: mean |W * G|, G the weight gradient averaged over batches (arXiv 2502.12171), [L].
    eva: explained variance ratios of each projection's centred inputs over real tokens
    (arXiv 2410.07170), the `components` largest, [L, components].
    """
    session = lab.session
    session = session.with_config(dataclasses.replace(session.config, objective=objective))
    with jax.set_mesh(session.mesh):
        return _calibrate(session, lab, batches, components)


def _calibrate(session: Session, lab: Lab, batches: int, components: int) -> dict:
    config, model = session.config, session.model_config
    settings = dataclasses.replace(StepSettings.of(config), weight_grad_norms=True)
    gradients = make_gradients(model, settings)

    @jax.jit
    def measure(
        lora: Tree, base: Tree, batch: TrainBatch, tokens: jax.Array, mask: jax.Array
    ) -> tuple[Tree, Tree, Tree]:
        _, grads, kernel_grads, _, _ = gradients(base, session.adapters(lora), batch)
        fim = {m: _used_mean(g["b"], session.device_plan.masks[m]) for m, g in grads.items()}
        moments = input_moments(model, base, tokens, mask)
        moments = {m: {**moments[m], "count": jnp.sum(mask)} for m in session.plan.modules}
        return fim, kernel_grads, moments  # type: ignore[return-value]

    # Second moments and the weights' gradient are gigabytes of a large model.
    add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)
    lora, programs = session.init_lora(), lab.programs(session)
    total = None
    for step in range(batches):
        prompts, rollout, advantages = _rows(session, programs, lora, step)
        batch = make_train_batch(session, programs, lora, prompts, rollout, advantages)
        group = len(rollout.lengths) // len(prompts.texts)
        tokens, starts = train_rows(prompts, rollout.tokens, rollout.lengths, group)
        seen = np.arange(tokens.shape[1])[None, :] < (starts + rollout.lengths)[:, None]
        found = measure(lora, session.base, batch, *shard_rows(session.mesh, (tokens, seen)))
        total = found if total is None else add(total, found)
    assert total is not None
    fim, kernel_grads, moments = total

    @jax.jit
    def gora(base: Tree, kernel_grads: Tree) -> Tree:
        return {
            m: jnp.mean(jnp.abs(base["layers"][m]["kernel"] * g / batches), axis=(1, 2))
            for m, g in kernel_grads.items()
        }

    return {
        "fim": {m: (np.asarray(v) / batches).tolist() for m, v in fim.items()},
        "gora": {m: np.asarray(v).tolist() for m, v in gora(session.base, kernel_grads).items()},
        "eva": {m: explained_variance(v, components).tolist() for m, v in moments.items()},
    }


def _rows(
    session: Session, programs: Programs, lora: Tree, step: int
) -> tuple[PromptBatch, Rollout, np.ndarray]:
    """What a step of the run's objective would train on: prompts, completions, advantages."""
    grpo = session.config.grpo
    if session.config.objective == "sft":
        prompts, rollout = gold_rollout(session, step)
        return prompts, rollout, np.ones(len(rollout.lengths), np.float32)
    prompts, rollout = sample_rollout(session, programs, lora, step)
    texts = completion_texts(session.tokenizer, rollout, session.config.rollout.stop_strings)
    rewards, by_function = score(session, prompts, texts, rollout)
    weights = list(session.config.rewards.values())
    compared, group = compared_rewards(grpo, rewards, by_function, weights)
    return prompts, rollout, compute_advantages(compared, group, grpo.scale_rewards)


def _used_mean(gradient: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean square [L] over the rows in use of [L, R, out]."""
    used = jnp.maximum(mask.sum(axis=1) * gradient.shape[2], 1.0)
    return jnp.sum(jnp.square(gradient), axis=(1, 2)) / used


def explained_variance(moments: Tree, components: int) -> np.ndarray:
    """[L, components]: the largest eigenvalues of the inputs' covariance over its trace.

    By orthogonal iteration with a Rayleigh-Ritz step (Golub and Van Loan 2013, Matrix Computations,
    section 8.2.4), in twice as many directions and some: an eigenvalue errs by a part of
    (the first left out / it) ** (2 * ITERATIONS). All of a down projection's would take minutes.
    """
    return np.asarray(_leading(moments["sum"], moments["outer"], moments["count"], components))


@functools.partial(jax.jit, static_argnums=3)
def _leading(total: jax.Array, outer: jax.Array, count: jax.Array, components: int) -> jax.Array:
    width = min(2 * components + 16, outer.shape[-1])
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def of_layer(moments: tuple[jax.Array, jax.Array]) -> jax.Array:
        mean, second = moments[0] / count, moments[1]

        def covariance_times(x: jax.Array) -> jax.Array:
            return exact(second, x) / count - jnp.outer(mean, exact(mean, x))

        def turn(_: int, q: jax.Array) -> jax.Array:
            return jnp.linalg.qr(covariance_times(q))[0]

        start = jax.random.normal(jax.random.key(0), (len(mean), width))
        q = jax.lax.fori_loop(0, ITERATIONS, turn, jnp.linalg.qr(start)[0])
        values = jnp.linalg.eigvalsh(exact(q.T, covariance_times(q)))[::-1]
        trace = jnp.trace(second) / count - jnp.sum(mean * mean)
        return values[:components].clip(min=0) / trace

    return jax.lax.map(of_layer, (total, outer))

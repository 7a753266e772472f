"""What to change in a configuration whose programs do not fit: tried by formula, then compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from jaxgrpo.ahead.analytic import prompt_slots
from jaxgrpo.ahead.chips import Topology, slice_shapes
from jaxgrpo.ahead.estimate import Estimate
from jaxgrpo.ahead.programs import replace_mesh
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.model.api import Qwen2Config
from jaxgrpo.model.remat import kept_bytes_per_token, remat_that_fits
from jaxgrpo.rank_plan import RankPlan

MAX_TRIES = 4
"""Candidates that are compiled before giving up; each costs what the check itself did."""


def suggest(
    config: Config,
    model: Qwen2Config,
    plan: RankPlan,
    topology: Topology,
    try_out: Callable[[Config, Topology], Estimate],
) -> tuple[list[str], Estimate] | None:
    """The least change that fits, as words for the command line, and what it was found to need.

    Args:
        try_out: compiles a candidate.
    """
    few = itertools.islice(candidates(config, model, plan, topology), MAX_TRIES)
    for changed, where in few:
        found = try_out(changed, where)
        if not found.shortfall:
            return describe(config, changed, topology, where), found
    return None


def candidates(
    config: Config, model: Qwen2Config, plan: RankPlan, topology: Topology
) -> Iterator[tuple[Config, Topology]]:
    """Changes that fit by formula, the least first: micro-batches, the mesh, fewer prompts, and at
    last a larger slice."""
    larger = [s for s in slice_shapes(topology.chip) if math.prod(s) > topology.chips]
    for where in (topology, *(Topology(topology.chip, shape) for shape in larger[:3])):
        found = []
        for mesh_cost, meshed in _meshes(config, model, where.chips):
            for batch_cost, changed in _batches(meshed):
                if not describe(config, changed, topology, where):
                    continue
                if not _divides(changed):
                    continue
                if needed(changed, model, plan) <= 0.9 * topology.chip.hbm_bytes:
                    found.append((mesh_cost + batch_cost, len(found), changed))
        for _, _, changed in sorted(found, key=lambda one: one[:2]):
            yield changed, where


def _meshes(config: Config, model: Qwen2Config, devices: int) -> Iterator[tuple[int, Config]]:
    old = config.mesh
    fixed = max(1, old.fsdp) * max(1, old.model)
    if devices % fixed == 0:
        yield 0, replace_mesh(config, devices // fixed, max(1, old.fsdp), max(1, old.model))
    for part in (1, 2, 4, 7, 8, 14, 16):
        if devices % part or model.num_heads % part or model.intermediate_size % part:
            continue
        if model.vocab_size % part:
            continue
        for fsdp in (1, 2, 4, 8, 16):
            if devices % (part * fsdp) or model.hidden_size % fsdp:
                continue
            new = replace_mesh(config, devices // part // fsdp, fsdp, part)
            if (fsdp, part) != (old.fsdp, old.model):
                # Splitting heads costs two reductions per layer and token; fsdp is cheaper.
                yield 2 + round(math.log2(fsdp)) + 2 * round(math.log2(part)), new


def _batches(config: Config) -> Iterator[tuple[int, Config]]:
    grpo = config.grpo
    for halvings in range(4):
        prompts = grpo.prompts_per_step >> halvings
        if prompts << halvings != grpo.prompts_per_step:
            break
        for doublings in range(6):
            micro = grpo.micro_batches << doublings
            try:
                new = dataclasses.replace(grpo, prompts_per_step=prompts, micro_batches=micro)
            except ConfigError:
                break
            # Another batch is another experiment; micro-batches change nothing but time.
            yield 8 * halvings + doublings, dataclasses.replace(config, grpo=new)


def _divides(config: Config) -> bool:
    shards = config.mesh.data * config.mesh.fsdp
    rows = config.grpo.rows_per_step // config.grpo.micro_batches
    counts = (config.grpo.prompts_per_step, rows, config.eval.batch_prompts)
    return all(count % shards == 0 for count in counts)


def needed(config: Config, model: Qwen2Config, plan: RankPlan) -> float:
    """Bytes per device by formula: the larger of sampling and training."""
    mesh, size = config.mesh, model.compute_dtype.itemsize
    shards = mesh.data * mesh.fsdp
    frozen = model.num_parameters * size / (mesh.fsdp * mesh.model)
    width = sum(sum(model.module_shapes[module]) for module in plan.modules)
    state = 3 * 4 * plan.layers * plan.max_rank * width / max(1, min(mesh.fsdp, mesh.model))
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    own = model.num_parameters - (0 if mesh.fsdp > 1 else tables)
    prompt, completion = prompt_slots(config), config.rollout.max_completion_tokens
    prompts, rows = config.grpo.prompts_per_step, config.grpo.rows_per_step
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * size
    caches = (prompts * prompt + rows * completion) / shards * per_token
    scores = 3 * 4 * rows / shards * model.vocab_size / mesh.model
    sampling = own * size / mesh.model + caches + scores
    tokens = max(1, rows // config.grpo.micro_batches // shards) * (prompt + completion)
    kept = kept_bytes_per_token(model)
    if remat_that_fits(model, tokens, 0) == "full":
        kept = model.num_layers * model.hidden_size * size
    heads = model.num_heads / mesh.model * (prompt + completion) * 4 * 3
    inside = (4 * model.hidden_size + 4 * model.intermediate_size / mesh.model) * size
    chunk = 3 * config.grpo.logprob_chunk_tokens * model.vocab_size * 4 / mesh.model
    training = tokens * (kept + inside + heads) + chunk + state / 3
    return frozen + state + max(sampling, training)


def describe(old: Config, new: Config, before: Topology, after: Topology) -> list[str]:
    """The change as it is written on the command line."""
    words = []
    for section in ("mesh", "grpo"):
        was, now = getattr(old, section), getattr(new, section)
        for member in dataclasses.fields(was):
            value = getattr(now, member.name)
            if value != getattr(was, member.name) and getattr(was, member.name) != -1:
                words.append(f"{section}.{member.name}={value}")
    if before != after:
        words.append(f"--topology {after}")
    return words

"""What to change in a configuration whose programs do not fit: tried by formula, then compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from jaxgrpo.ahead.chips import Topology, slice_shapes
from jaxgrpo.ahead.estimate import Estimate
from jaxgrpo.ahead.memory import foretell
from jaxgrpo.ahead.programs import replace_mesh
from jaxgrpo.ahead.shapes import remat_of_run
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.devices import Device
from jaxgrpo.model.api import QwenConfig
from jaxgrpo.rank_plan import RankPlan

MAX_TRIES = 4
"""Candidates that are compiled before giving up; each costs what the check itself did."""


def suggest(
    config: Config,
    model: QwenConfig,
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
    config: Config, model: QwenConfig, plan: RankPlan, topology: Topology
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
                if needed(changed, model, plan, where) <= 0.9 * topology.chip.hbm_bytes:
                    found.append((mesh_cost + batch_cost, len(found), changed))
        for _, _, changed in sorted(found, key=lambda one: one[:2]):
            yield changed, where


def _meshes(config: Config, model: QwenConfig, devices: int) -> Iterator[tuple[int, Config]]:
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
    counts = (config.grpo.prompts_per_step, config.eval.batch_prompts)
    return all(count % shards == 0 for count in counts)


def needed(config: Config, model: QwenConfig, plan: RankPlan, topology: Topology) -> int:
    """Bytes per chip by formula: the most that any phase holds."""
    mesh = config.mesh
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "model": mesh.model}
    device = Device(
        "tpu",
        topology.chip.name,
        topology.chips,
        mesh.data * mesh.fsdp,
        topology.chip.hbm_bytes,
    )
    model = dataclasses.replace(model, device=device)
    return foretell(config, model, plan, sizes, remat_of_run(config, model)).peak


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

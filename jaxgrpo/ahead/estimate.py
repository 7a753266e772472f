"""What compiled programs need and how long they take at best: memory by kind, roofline, fit."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgrpo.ahead.chips import GIB, LINK_SECONDS, Chip
from jaxgrpo.ahead.hlo import Counts, count
from jaxgrpo.ahead.memory import BATCH, FROZEN, SAMPLER, STATE, WORKING, Memory, foretell
from jaxgrpo.ahead.programs import PROGRAMS, Lowered, bytes_per_device
from jaxgrpo.ahead.shapes import remat_of_run
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.devices import device_of
from jaxgrpo.model.api import QwenConfig, resharded_bytes
from jaxgrpo.rank_plan import RankPlan


@dataclass(frozen=True)
class Program:
    """One compiled program on one device.

    Attributes:
        seconds: its roofline: every instruction at the slower of its operations and its bytes,
            and collectives one after another. None without a chip to hold it against.
        communication: the part of `seconds` that is collectives.
        working: bytes that it needs besides its arguments: temporaries, results, code.
    """

    name: str
    counts: Counts
    working: int
    seconds: float | None = None
    communication: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A configuration on a mesh.

    Attributes:
        memory: kind -> bytes per device; not all of them are held at once.
        phases: program -> bytes per device while it runs; of one that the compiler refused, what it
            says that it needs.
        foretold: the same by formula.
        quick: compiled with less effort than a run would be (`QUICK_OPTIONS`).
        arms: so many runs are sampled and updated together.
        resharded: bytes that each device receives when the sampler's weights are laid out.
    """

    config: Config
    model: QwenConfig
    remat: str
    mesh: dict[str, int]
    devices: int
    programs: dict[str, Program]
    memory: dict[str, int]
    phases: dict[str, int]
    foretold: Memory
    limit: int | None
    resharded: int
    quick: bool = False
    arms: int = 1

    @property
    def shortfall(self) -> int:
        """Bytes missing per device; 0 if it fits, or if there is no limit."""
        if self.limit is None:
            return 0
        return max(0, max(self.phases.values()) - self.limit)

    @property
    def short_phases(self) -> set[str]:
        """The programs that do not fit."""
        if self.limit is None:
            return set()
        return {name for name, size in self.phases.items() if size > self.limit}

    @property
    def step_seconds(self) -> float | None:
        """Layout, rollout and updates; rewards and the host are not in it."""
        times = {name: program.seconds for name, program in self.programs.items()}
        if any(s is None for s in times.values()) or len(times) < 3:
            return None
        updates = self.config.grpo.num_iterations
        return sum((s or 0.0) * (updates if n == "train" else 1) for n, s in times.items())

    @property
    def tokens_per_second(self) -> float | None:
        """Completion tokens of a step over its time, all devices together."""
        seconds = self.step_seconds
        rows = self.arms * self.config.grpo.rows_per_step
        tokens = rows * self.config.rollout.max_completion_tokens
        return None if not seconds else tokens / seconds


def estimate(
    config: Config,
    model: QwenConfig,
    plan: RankPlan,
    mesh: Mesh,
    chip: Chip | None,
    quick: bool = False,
    arms: int = 1,
) -> Estimate:
    """Compiles the programs of a run for a mesh and adds up what they say.

    Args:
        chip: what the mesh's devices are; None: whatever is here, without a roofline.
        quick: compile in a third of the time, with `QUICK_OPTIONS`.
        arms: so many runs are sampled and updated together.
    """
    model = replace(model, device=device_of(mesh, None if chip is None else chip.hbm_bytes))
    arms = model.device.arm_slots(arms)
    limit, remat = model.device.memory, remat_of_run(config, model, arms)
    lowered = Lowered(config, model, plan, mesh, remat, quick, arms)
    programs: dict[str, Program] = {}
    refused: dict[str, int] = {}
    for name in PROGRAMS:
        try:
            compiled = lowered.compile(name)
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            refused[name] = needed
            if name == "layout":
                break  # the rollout takes what it makes
            continue
        programs[name] = _measure(name, compiled, mesh.size, chip)
        del compiled
        gc.collect()
    memory, phases = _memory(lowered, programs, refused)
    return Estimate(
        config=config,
        model=model,
        remat=remat,
        mesh=dict(mesh.shape),
        devices=mesh.size,
        programs=programs,
        memory=memory,
        phases=phases,
        foretold=foretell(config, model, plan, mesh.shape, remat, arms),
        limit=limit,
        resharded=resharded_bytes(model, mesh),
        quick=quick,
        arms=arms,
    )


def _measure(name: str, compiled: Any, devices: int, chip: Chip | None) -> Program:
    stats = compiled.memory_analysis()
    working = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    if name != "layout":  # what it makes is counted as the sampler's weights
        working += stats.output_size_in_bytes - stats.alias_size_in_bytes
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"jaxlib cannot read what libtpu compiled ({line}); install the libtpu that this jax "
            "asks for: pip install 'jaxgrpo[tpu]'"
        ) from None
    counts = count(text, devices)
    if chip is None:
        return Program(name, counts, working)
    computing = sum(t * max(f / chip.flops, b / chip.bandwidth) for f, b, t in counts.pieces)
    talking = communication_seconds(counts, chip)
    return Program(name, counts, working, computing + talking, talking)


def communication_seconds(counts: Counts, chip: Chip) -> float:
    """Collectives as rings along one axis of the torus, none of them hidden behind computing."""
    total = 0.0
    for (kind, size), found in counts.collectives.items():
        if size == 1:
            continue
        rounds = 2 if kind == "all-reduce" else 1
        # A permutation sends to neighbours; a ring passes everything half way round, both ways.
        share, hops = (size - 1) / size, size / 2
        if kind == "collective-permute":
            share, hops = 1.0, 1.0
        total += rounds * share * found.bytes / chip.link_bandwidth
        total += found.count * rounds * hops * LINK_SECONDS
    return total


def _memory(
    lowered: Lowered, programs: dict[str, Program], refused: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    arguments = lowered.arguments
    frozen = bytes_per_device(arguments.base)
    state = bytes_per_device(lowered.of_arms(arguments.state))
    memory = {FROZEN: frozen, STATE: state}
    held = frozen + state
    phases = {name: held + size for name, size in refused.items()}
    sampler = 0
    if lowered.sampler is not None:
        sampler = bytes_per_device(lowered.sampler) - lowered.shared_bytes()
        memory[SAMPLER] = sampler
    for name, program in programs.items():
        memory[WORKING[name]] = program.working
        phases[name] = held + program.working + (sampler if name != "train" else 0)
        if name == "train":
            batch = bytes_per_device(lowered.of_arms(arguments.batch))
            memory[BATCH] = batch
            phases[name] += batch
    return memory, phases


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def needed_bytes(message: str) -> int | None:
    """What a program needs for itself that the TPU compiler refuses; None: it is another error."""
    number = r"([0-9.]+)([KMGT]?)"
    match = re.search(rf"temporaries \({number}\) exceeds available HBM", message)
    match = match or re.search(rf"Used {number} of [0-9.]+[KMGT]? hbm", message)
    return None if match is None else int(float(match[1]) * _UNITS[match[2]])

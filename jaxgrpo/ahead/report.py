"""What a check found, as tables for a person."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from jaxgrpo.ahead.chips import GIB, Chip
from jaxgrpo.ahead.estimate import Estimate, Program
from jaxgrpo.ahead.flops import rollout_flops, train_hardware_flops
from jaxgrpo.ahead.memory import foretell
from jaxgrpo.ahead.shapes import remat_of_run
from jaxgrpo.config import Config
from jaxgrpo.devices import device_here
from jaxgrpo.mesh import planned_sizes
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.rank_plan import RankPlan


def print_estimate(
    found: Estimate, plan: RankPlan, where: str, chip: Chip | None, console: Console
) -> None:
    """Model and mesh, memory by kind, operations and collectives by program, time."""
    grpo = found.config.grpo
    arms = f"{found.arms} arms of " if found.arms > 1 else ""
    console.print(
        f"{found.model.num_parameters:,} parameters in {found.model.dtype}, {arms}"
        f"{plan.total_rank:,} ranks, {grpo.prompts_per_step} prompts x {grpo.group_size} "
        f"completions, remat {found.remat}\nmesh {found.mesh} on {where}",
        highlight=False,
    )
    console.print(_memory_table(found))
    console.print(_program_table(found, plan))
    for name, program in found.programs.items():
        for line in (*collective_lines(program), *uncounted_lines(program)):
            console.print(f"{name}: {line}", highlight=False, soft_wrap=True)
    if found.resharded:
        console.print(
            f"weights laid out for sampling: each device receives {found.resharded / GIB:.2f} GiB "
            "once per iteration",
            highlight=False,
        )
    if found.step_seconds is not None and chip is not None:
        talking = sum(p.communication or 0.0 for p in found.programs.values())
        console.print(
            f"step at best {found.step_seconds:.2f} s, of which collectives {talking:.2f} s: "
            f"{found.tokens_per_second:,.0f} completion tokens/s "
            f"({(found.tokens_per_second or 0) / found.devices:,.0f} per chip), by the roofline of "
            f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s of memory and "
            f"{chip.link_bandwidth / 1e9:.0f} GB/s of links; every completion runs to the cap; "
            "rewards and the host are not in it",
            highlight=False,
        )
    if found.quick:
        console.print(
            "compiled quickly: a run's own programs move fewer bytes, up to two fifths, and their "
            "steps are up to a quarter shorter"
        )


def print_foretold(config: Config, model: QwenConfig, plan: RankPlan, console: Console) -> None:
    """Memory and operations by formula, on devices like those here."""
    sizes = planned_sizes(config.mesh)
    model = dataclasses.replace(model, device=device_here(sizes))
    remat = remat_of_run(config, model)
    memory = foretell(config, model, plan, sizes, remat)
    title = f"memory of each {model.device.platform} by formula, mesh {sizes}, remat {remat}"
    console.print(title, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("MiB", justify="right")
    parts = {"": memory.held, **memory.parts}
    for name, part in parts.items():
        for kind, size in part.items():
            table.add_row(f"{name}: {kind}" if name else kind, mib(size))
    for name, size in memory.phases.items():
        table.add_row(f"all while {name} runs", mib(size))
    table.add_row("peak", mib(memory.peak))
    console.print(table)
    operations = {
        "rollout": rollout_flops(config, model, plan),
        "train": train_hardware_flops(config, model, plan, remat),
    }
    told = ", ".join(f"{name} {flops / 1e12:.4g}" for name, flops in operations.items())
    console.print(f"TFLOP of a step, all devices together: {told}", highlight=False)


def _memory_table(found: Estimate) -> Table:
    table = Table(title="memory per device, MiB", title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("compiled", justify="right")
    table.add_column("by formula", justify="right")
    formula = found.foretold.by_kind()
    for kind, size in found.memory.items():
        table.add_row(kind, mib(size), mib(formula[kind]))
    for name, size in found.phases.items():
        foretold = found.foretold.phases[name]
        table.add_row(f"all while {name} runs", mib(size), mib(foretold))
    if found.limit is not None:
        table.add_row("there is", mib(found.limit), "")
    return table


def _program_table(found: Estimate, plan: RankPlan) -> Table:
    table = Table(title="per device and run", title_justify="left", box=None, pad_edge=False)
    for heading in ("program", "TFLOP", "by formula", "GB of memory", "s at best", "collectives s"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    formulas = {
        "rollout": rollout_flops(found.config, found.model, plan, found.arms),
        "train": train_hardware_flops(found.config, found.model, plan, found.remat, found.arms),
    }
    for name, program in found.programs.items():
        formula = formulas.get(name)
        table.add_row(
            name,
            f"{program.counts.flops / 1e12:.4g}",
            "" if formula is None else f"{formula / found.devices / 1e12:.4g}",
            f"{program.counts.bytes / 1e9:.1f}",
            "" if program.seconds is None else f"{program.seconds:.3f}",
            "" if program.communication is None else f"{program.communication:.3f}",
        )
    return table


def collective_lines(program: Program) -> list[str]:
    """One line per kind and group size."""
    return [
        f"{found.count:,.0f} {kind} over {size} devices, {found.bytes / 1e9:.3f} GB"
        for (kind, size), found in sorted(program.counts.collectives.items())
        if size > 1
    ]


def uncounted_lines(program: Program) -> list[str]:
    """What the figures of a program are without."""
    counts, lines = program.counts, []
    if counts.kernels:
        lines.append(f"its TFLOP are without those of {', '.join(sorted(counts.kernels))}")
    if counts.unbounded_loops:
        lines.append(
            f"{counts.unbounded_loops} loops have no trip count that can be read; what they do is "
            "counted once"
        )
    if counts.unknown:
        found = ", ".join(f"{name} ({times:,.0f} x)" for name, times in counts.unknown.items())
        lines.append(f"of what is not known here, only operands and results are counted: {found}")
    return lines


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"

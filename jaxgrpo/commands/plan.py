"""`plan`: print, draw, edit or write a rank plan; and `--dry-run`, which shows it with the rest."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxgrpo.commands.command import Command
from jaxgrpo.config import MAX_RANK, MODULES, Config, ConfigError
from jaxgrpo.config_files import dump_config
from jaxgrpo.rank_plan import RankPlan, make_rank_plan
from jaxgrpo.records.run_directory import atomic_write_json
from jaxgrpo.study.config import StudyConfig
from jaxgrpo.study.sweep import SweepConfig

_EDIT = re.compile(rf"(layers|{'|'.join(MODULES)})(?:\.([0-9]{{1,4}})(?:-([0-9]{{1,4}}))?)?=(.*)")
_SHADES = " ░▒▓█"


@dataclass(frozen=True)
class PlanSettings(Config):
    """A run's settings, and what to do with its plan."""

    out: str | None = None
    """A .json file to write the plan to, or a .png or .svg picture of it."""
    draw: int | None = None
    """Draw a random plan of as many ranks from this seed."""
    edits: tuple[str, ...] = ()
    """Changes in order, as written: q_proj=8, q_proj.3=8, layers.0-3=0."""


def take_edits(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits words into settings and edits of the plan."""
    edits = tuple(word for word in words if _EDIT.fullmatch(word))
    rest = [word for word in words if not _EDIT.fullmatch(word)]
    return rest, {"edits": edits} if edits else {}


def run(settings: PlanSettings, console: Console) -> int:
    model, plan = open_plan(settings)
    ranks = {module: values.copy() for module, values in plan.ranks.items()}
    if settings.draw is not None:
        ranks = draw(plan, model, settings.draw)
    for edit in settings.edits:
        apply_edit(edit, ranks)
    scales = plan.scale_factors
    plan = make_rank_plan(settings.lora, model.num_layers, ranks)
    plan = dataclasses.replace(plan, scale_factors=scales)
    print_plan(plan, model, console)
    if settings.out is None:
        return 0
    out = Path(settings.out)
    if out.suffix == ".json":
        written = plan.to_json()
        atomic_write_json(out, {key: written[key] for key in ("ranks", "scales") if key in written})
    elif out.suffix in (".png", ".svg"):
        draw_picture(plan, out)
    else:
        raise ConfigError(f"out: {out} is none of .json, .png and .svg")
    console.print(f"wrote {out}", highlight=False)
    return 0


def open_plan(config: Config) -> tuple[Any, RankPlan]:
    """The model's shapes and the plan, from config.json alone: no weights are read or fetched."""
    from jaxgrpo.model.weights import read_qwen_config, resolve_model_dir
    from jaxgrpo.session import resolve_dtype, resolve_plan

    directory = resolve_model_dir(config.model.path, config.model.revision, ["config.json"])
    model = read_qwen_config(directory, resolve_dtype(config.model.dtype))
    return model, resolve_plan(config.lora, model)[0]


def apply_edit(edit: str, ranks: dict[str, np.ndarray]) -> None:
    """Changes `ranks` as `layers.0-3=8` or `q_proj=4` says; a module without ranks gets them."""
    match = _EDIT.fullmatch(edit)
    assert match is not None, edit
    name, first, last, value = match.groups()
    layers = len(next(iter(ranks.values())))
    if not re.fullmatch(r"[0-9]{1,5}", value) or int(value) > MAX_RANK:
        raise ConfigError(f"plan: {edit} needs a rank in 0..{MAX_RANK}")
    start = 0 if first is None else int(first)
    stop = layers if first is None else int(last or first) + 1
    if not start < stop <= layers:
        raise ConfigError(f"plan: {edit}: the model has the layers 0..{layers - 1}")
    for module in list(ranks) if name == "layers" else [name]:
        ranks.setdefault(module, np.zeros(layers, np.int64))[start:stop] = int(value)


def draw(plan: RankPlan, model: Any, seed: int) -> dict[str, np.ndarray]:
    """Random ranks for the same adapters, as many in all."""
    from jaxgrpo.study.allocate import allocate
    from jaxgrpo.study.budget import Budget

    mean = -(-plan.total_rank // plan.num_adapters)
    budget = Budget(plan.total_rank, "ranks", min(1, mean), 2 * mean, "module")
    ones = {module: np.ones(plan.layers) for module in plan.modules}
    return allocate("random", ones, model.module_shapes, budget, seed=seed)


def print_plan(plan: RankPlan, model: Any, console: Console) -> None:
    """A table of the ranks, shaded by size, and what they add up to."""
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", *plan.modules):
        table.add_column(heading, justify="right")
    largest = max(int(ranks.max()) for ranks in plan.ranks.values())
    for layer in range(plan.layers):
        cells = []
        for module in plan.modules:
            rank = int(plan.ranks[module][layer])
            shade = _SHADES[-(-rank * (len(_SHADES) - 1) // largest)]
            cells.append(f"{rank} {shade}")
        table.add_row(str(layer), *cells)
    console.print(table)
    trainable = plan.trainable_parameters(model.module_shapes)
    console.print(
        f"{plan.total_rank} ranks, {trainable:,} trainable parameters "
        f"({trainable / model.num_parameters:.2%} of {model.num_parameters:,}), "
        f"scale rule {plan.scale_rule}, alpha {plan.alpha:g}",
        highlight=False,
    )


def draw_picture(plan: RankPlan, path: Path) -> None:
    """Layers by projections, coloured by rank."""
    from matplotlib.figure import Figure

    grid = np.array([plan.ranks[module] for module in plan.modules])
    figure = Figure(figsize=(2 + 0.3 * plan.layers, 1 + 0.35 * len(grid)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(grid)), plan.modules)
    axes.set_xlabel("layer")
    axes.set_title(f"ranks ({plan.total_rank} in all)")
    figure.colorbar(image, ax=axes, label="rank")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def dry_run(config: Config, console: Console) -> int:
    """Settings, plan, parameters, memory and operations; nothing is loaded or written."""
    from jaxgrpo.ahead.report import print_foretold

    console.print(dump_config(config), highlight=False, markup=False, end="")
    console.print()
    for each in config.studies() if isinstance(config, SweepConfig) else [config]:
        if each.model.path != config.model.path:
            console.rule(f"[bold]{each.model.path}", align="left")
        model, plan = open_plan(each)
        print_plan(plan, model, console)
        if isinstance(each, StudyConfig):
            print_arms(each, console)
            # An arm's adapters are as wide as the largest rank of any.
            wide = dataclasses.replace(each.lora, max_rank=each.widest)
            plan = make_rank_plan(wide, model.num_layers)
        print_foretold(each, model, plan, console)
        if isinstance(each, StudyConfig):
            print_rounds(each, model, console)
    console.print("dry run: nothing was loaded or written")
    return 0


def print_arms(config: StudyConfig, console: Console) -> None:
    """What a study would train, after checking that every plan can be made.

    Raises:
        ConfigError: the first plan that no importance can turn into ranks.
    """
    from jaxgrpo.study.config import arm_label, list_arms
    from jaxgrpo.study.planner import Planner
    from jaxgrpo.study.sections import BOUNDED

    planner = Planner(config)
    planner.check()
    arms = list_arms(config)
    table = Table(title="arms", title_justify="left", box=None, pad_edge=False)
    for heading in ("arm", "seeds", "smallest rank", "largest"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for group in dict.fromkeys(arm.group for arm in arms):
        mine = [arm for arm in arms if arm.group == group]
        plan, mean = mine[0].plan, mine[0].mean_rank
        low, high = config.bounds(mean, plan) if plan in BOUNDED else (mean, mean)
        if plan in ("adalora", "para"):
            low, high = 0, planner.start(mine[0])
        table.add_row(arm_label(mine[0], config), str(len(mine)), str(low), str(high))
    console.print(table)
    settings = config.study
    rules, each = len(settings.probe.scale_rules), settings.profile.steps
    # A uniform run beside each but the first, whose uniform run is the profile.
    probes = settings.probe.runs * (rules + 1) - 1 if rules else 0
    console.print(
        f"{len(arms)} arms of {config.steps} steps; before them {each} steps for each profile "
        f"({', '.join(settings.profile.objectives)}) and probe ({probes}): "
        f"{len(arms) * config.steps + (len(settings.profile.objectives) + probes) * each:,} in all",
        highlight=False,
    )


def print_rounds(config: StudyConfig, model: Any, console: Console) -> None:
    """Which arms a study, or a worker of a sweep, would train side by side on devices like those
    here, and what a round holds."""
    from jaxgrpo.ahead.memory import fitting_arms, foretell
    from jaxgrpo.ahead.report import mib
    from jaxgrpo.ahead.shapes import remat_of_run
    from jaxgrpo.devices import device_here
    from jaxgrpo.mesh import planned_sizes
    from jaxgrpo.study.config import arm_label, list_arms
    from jaxgrpo.study.runs import alike_arms, arm_configs, split_rounds, stages

    sizes = planned_sizes(config.mesh)
    model = dataclasses.replace(model, device=device_here(sizes))
    arms, configs, memory = list_arms(config), arm_configs(config), model.device.memory
    found: Counter = Counter()
    largest = 0
    for alike in (alike for stage in stages(config) for alike in alike_arms(config, stage)):
        one = configs[alike[0]]
        plan = make_rank_plan(dataclasses.replace(one.lora, plan=None), model.num_layers)
        fit = fitting_arms(one, model, plan, sizes, len(alike))
        rounds = split_rounds(alike, config.study.together or fit)
        slots = model.device.arm_slots(rounds[0].slots)
        peak = foretell(one, model, plan, sizes, remat_of_run(one, model, slots), slots).peak
        names = ", ".join(dict.fromkeys(arm_label(arms[n], config) for n in alike))
        fits = "unknown" if memory is None else str(fit)
        kind = (names, len(alike), fits, slots, slots * one.grpo.rows_per_step, mib(peak))
        found[kind] += len(rounds)
        largest = max(largest, peak)
    table = Table(title="rounds", title_justify="left", box=None, pad_edge=False)
    for heading in ("arms", "alike", "fit", "side by side", "rows a step", "peak, MiB", "rounds"):
        table.add_column(heading, justify="left" if heading == "arms" else "right")
    for kind, rounds in found.items():
        table.add_row(*map(str, kind), str(rounds))
    console.print(table)
    console.print(f"{found.total()} rounds of {config.steps} steps", highlight=False)
    if memory is not None and largest > memory:
        console.print(
            f"[yellow]warning:[/] a round takes {mib(largest)} MiB, and a {model.device.platform} "
            f"has {mib(memory)} for programs: lower study.together, or leave it out",
            highlight=False,
        )


PLAN = Command(
    run,
    "print, draw or edit the ranks of a run and count parameters",
    "Words that name a projection or layers change the plan, in the order given:\n\n"
    "  q_proj=8          rank 8 for q_proj in every layer\n"
    "  down_proj.3=16    in layer 3\n"
    "  layers.0-5=0      every projection of the layers 0 to 5: no adapter there\n"
    "  draw=SEED         first replace the plan by a random one of as many ranks\n"
    "  out=plan.json     write it, for lora.plan=plan.json; or draw it: out=plan.png\n\n"
    "Only the model's config.json is read. lora.rank, lora.plan and lora.adapter say\n"
    "where it starts from.",
    "plan lora.rank=8 layers.0-1=4 q_proj.7=16 out=plan.json",
    config=PlanSettings,
    collects=take_edits,
    ignores=("grpo", "optim", "rollout", "data", "eval", "mesh", "rewards", "steps", "objective"),
)

"""What the arms of a study cost: what plans came to, and what those that move ended at."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxgrpo.config import Config
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.records.run_directory import RunDirectory
from jaxgrpo.study.allocate import spent
from jaxgrpo.study.config import Arm, StudyFiles
from jaxgrpo.study.planner import Planner
from jaxgrpo.study.sections import DYNAMIC


def check_budgets(
    arms: Sequence[Arm], configs: Sequence[Config], planner: Planner, console: Console
) -> None:
    """Prints the realised ranks and asserts that arms of one mean rank cost the same.

    Those of `reduced` are spent differently by design, those of plans that move in the end.
    """
    table = Table(title="arms: realised ranks", title_justify="left")
    table.add_column("arm", no_wrap=True)
    for heading in ("ranks", "smallest", "largest", "parameters"):
        table.add_column(heading, justify="right")
    shapes = planner.shapes
    for arm, config in zip(arms, configs, strict=True):
        plan = make_rank_plan(config.lora, planner.layers)
        parameters = plan.trainable_parameters(shapes)
        every = np.concatenate(list(plan.ranks.values()))
        table.add_row(
            arm.name,
            str(plan.total_rank),
            str(every.min()),
            str(every.max()),
            f"{parameters:,}",
        )
        if arm.plan in DYNAMIC or arm.plan == "reduced":
            continue
        budget = planner.budget(arm.mean_rank, "module")
        cost = spent(plan.ranks, shapes, budget.unit)
        assert cost == budget.total, f"arm {arm.name} costs {cost}, not {budget.total}"
    console.print(table)


def check_spent(arms: Sequence[Arm], files: StudyFiles, planner: Planner, console: Console) -> None:
    """Says which of the plans that move or are cut did not end at what the others cost."""
    for arm in arms:
        if arm.plan not in DYNAMIC:
            continue
        budget = planner.budget(arm.mean_rank, "module")
        summary = RunDirectory(files.arm(arm)).summary
        ranks = json.loads(summary.read_text(encoding="utf-8"))["plan"]["ranks"]
        ended = {module: np.asarray(values) for module, values in ranks.items()}
        cost = spent(ended, planner.shapes, budget.unit)
        if cost != budget.total:
            console.print(
                f"[yellow]warning:[/] {arm.name} ended at {cost:,} {budget.unit}, the others "
                f"have {budget.total:,}"
            )

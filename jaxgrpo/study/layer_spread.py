"""How unevenly a plan's runs spread the gradient over layers, beside the uniform runs of their
seeds and what LoRA's algebra alone makes of these; and how unevenly uniform runs do. numpy only, no
jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.study.amplification import PHASES, Norms, steps_of
from jaxgrpo.study.arm_results import read_json
from jaxgrpo.study.config import Arm, StudyFiles
from jaxgrpo.study.gradient_types import Landscape, Range, Spread
from jaxgrpo.study.importance import (
    early_late_correlation,
    max_min_ratio,
    shares,
    top_count,
    top_share,
)
from jaxgrpo.study.norms import layer_norms, read_norms
from jaxgrpo.study.sections import DYNAMIC

Read = Callable[[Path], Norms | None]


def finished_norms(root: Path) -> Norms | None:
    """Raw norms of a run that has ended; None of any other."""
    return read_norms(root, "l2") if (root / "summary.json").is_file() else None


def layer_spread(
    groups: Mapping[str, Sequence[Arm]], files: StudyFiles, read: Read = finished_norms
) -> list[Spread]:
    """Of every plan but the uniform one that has a run beside a uniform run of its seed.

    Under Adam an adapter's raw gradient is in proportion to s sqrt(r) times what no rank enters, if
    ranks draw nothing: the gradient of B by x A, that of A by B, whose entries move at one rate
    whatever r is. So a spread is foretold from the uniform run's norms, ranks and scales.

    Args:
        groups: the runs that a report is of, under their name.
        read: a run's norms; a long run's file takes seconds, so who asks twice keeps them.
    """
    uniform = {
        (arm.objective, arm.mean_rank, arm.seed): arm
        for arms in groups.values()
        for arm in arms
        if arm.plan == "uniform"
    }
    levels = {key: read(files.arm(arm)) for key, arm in uniform.items()}
    found: list[Spread] = []
    for name, arms in groups.items():
        own, beside, foretold = [], [], []
        for arm in arms:
            key = (arm.objective, arm.mean_rank, arm.seed)
            level = levels.get(key)
            if arm.plan == "uniform" or level is None:
                continue
            if (norms := read(files.arm(arm))) is None:
                continue
            own.append(_by_phase(norms))
            beside.append(_by_phase(level))
            if arm.plan not in DYNAMIC:
                foretold.append(_by_phase(_moved(level, *map(files.arm, (uniform[key], arm))))[-1])
        if own:
            found.append(
                {
                    "run": name,
                    "seeds": len(own),
                    "uniform": [_over_seeds(x) for x in zip(*beside, strict=True)],
                    "own": [_over_seeds(x) for x in zip(*own, strict=True)],
                    "foretold": _over_seeds(foretold) if foretold else None,
                }
            )
    return found


def landscapes(
    groups: Mapping[str, Sequence[Arm]], files: StudyFiles, read: Read = finished_norms
) -> list[Landscape]:
    """Of the uniform runs that have finished, a group at a time: one objective and one rank.

    Args:
        groups, read: as of `layer_spread`.
    """
    found: list[Landscape] = []
    for name, arms in groups.items():
        runs = [read(files.arm(arm)) for arm in arms if arm.plan == "uniform"]
        by_layer = [layer_norms(dict(norms)) for norms in runs if norms is not None]
        by_layer = [norms for norms in by_layer if norms.any()]
        if not by_layer:
            continue
        ratios = [_ratios(norms) for norms in by_layer]
        held = [top_share(shares(norms)) for norms in by_layer]
        alike = [early_late_correlation(norms) for norms in by_layer]
        found.append(
            {
                "run": name,
                "objective": arms[0].objective,
                "seeds": len(by_layer),
                "steps": len(by_layer[0]),
                "max_min": [_over_seeds(x) for x in zip(*ratios, strict=True)],
                "top_layers": top_count(by_layer[0].shape[1], 0.3),
                "top_share": _mean_over_seeds(held),
                "early_late": _mean_over_seeds(alike),
            }
        )
    return found


def _by_phase(norms: Norms) -> list[float]:
    return _ratios(layer_norms(dict(norms)))


def _ratios(by_layer: np.ndarray) -> list[float]:
    """Largest over smallest share of norms [T, L] by thirds of the steps, then over all; infinite
    where a layer has no gradient."""
    phases = [by_layer[steps_of(phase, len(by_layer))] for phase in (*PHASES[1:], "all")]
    return [max_min_ratio(shares(x)) if x.size and x.any() else np.nan for x in phases]


def _moved(norms: Norms, uniform: Path, run: Path) -> Norms:
    """The norms of a uniform run at another's ranks and scales, no more than algebra."""
    was, now = map(_sizes, (uniform, run))
    return {module: values * now[module] / was[module] for module, values in norms.items()}


def _sizes(root: Path) -> dict[str, np.ndarray]:
    """module -> [L]: s sqrt(r) of a run's adapters."""
    plan = RankPlan.from_json(read_json(root / "summary.json")["plan"])
    scales = plan.scales()
    return {module: scales[module] * np.sqrt(plan.ranks[module]) for module in plan.modules}


def _over_seeds(ratios: Sequence[float]) -> Range:
    """Geometric mean and range over seeds; null where one is not finite."""
    if not np.isfinite(ratios).all():
        return {"value": None, "low": None, "high": None}
    middle = float(np.exp(np.mean(np.log(ratios))))
    return {"value": middle, "low": float(min(ratios)), "high": float(max(ratios))}


def _mean_over_seeds(values: Sequence[float | None]) -> Range:
    """Mean and range over seeds; null where one is not defined."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"value": None, "low": None, "high": None}
    return {"value": float(np.mean(known)), "low": min(known), "high": max(known)}

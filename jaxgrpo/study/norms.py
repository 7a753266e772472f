"""Gradient norms of a finished run, from its layer_grad_norms.jsonl. numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from jaxgrpo.config import MODULES
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.records.run_directory import read_jsonl


def read_norms(
    run_dir: Path, view: str, matrix: Literal["a", "b"] | None = None
) -> dict[str, np.ndarray] | None:
    """module -> [T, L]: each adapter's norm at each step, A and B as one (root of squares) or one.

    None when the run did not measure that view.
    """
    path = Path(run_dir) / "layer_grad_norms.jsonl"
    if not path.is_file():
        return None
    records = sorted(read_jsonl(path), key=lambda record: record["step"])
    if not records or view not in records[0]:
        return None
    norms = {}
    for module in (m for m in MODULES if m in records[0][view]):
        parts = [
            np.sqrt(
                np.sum(
                    [
                        np.square(x)
                        for name, x in record[view][module].items()
                        if matrix in (None, name)
                    ],
                    axis=0,
                )
            )
            for record in records
        ]
        norms[module] = np.array(parts, np.float64)
    return norms


def no_gradient(run_dir: Path) -> str | None:
    """Why every norm of a finished run is 0, in one clause; None: there is some gradient."""
    norms = read_norms(run_dir, "l2")
    if norms is None or any(values.any() for values in norms.values()):
        return None
    records = [r for r in read_jsonl(Path(run_dir) / "metrics.jsonl") if "step_time" in r]
    flat = all(record.get("frac_reward_zero_std") == 1 for record in records)
    why = (
        "in each the completions of every prompt got equal rewards, "
        f"{np.mean([record['reward'] for record in records]):.3g} on average"
        if flat
        else "no loss depended on the adapters"
    )
    return f"the gradient was 0 in all {len(records)} steps of {run_dir}: {why}"


def layer_norms(norms: dict[str, np.ndarray]) -> np.ndarray:
    """[T, L]: a layer's norm is that of all its gradients together (root of squares)."""
    return np.sqrt(np.sum([np.square(x) for x in norms.values()], axis=0))


def first_order_speed(plan: RankPlan, importance: Mapping[str, np.ndarray]) -> float:
    """How fast a plan learns at first, relative to `reference_rank` everywhere under its own rule.

    sum s_i r_i g_i / (s r sum g_i) over the adapters. One Adam step from B = 0 is dB = -lr
    sign(s A^T G): the loss falls by about s_i r_i times the gradient's size, so that under
    `constant` a rank is a learning rate too, and under `alpha_over_r` it is none.

    Args:
        importance: module -> [L], the size g of the gradient, best that of the frozen weight, which
            no rank enters.
    """
    at = plan.reference_rank
    uniform = {m: np.full(plan.layers, at) for m in plan.modules}
    level = dataclasses.replace(plan, ranks=uniform, scale_factors=None).scales()
    scales = plan.scales()
    speeds = [scales[m] * plan.ranks[m] @ importance[m] for m in plan.modules]
    reference = [level[m] * at @ importance[m] for m in plan.modules]
    return float(np.sum(speeds) / np.sum(reference))


def importance(norms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """module -> [L]: the norms summed over the run (arXiv 2605.07366)."""
    return {module: values.sum(axis=0) for module, values in norms.items()}

"""Holds four figures of a finished run against bounds: what scripts/gate_gsm8k.sh ends with.

    python scripts/gate_figures.py RUN_DIR MODEL BOUNDS.json

BOUNDS.json maps a model's name to figures, and each of the figures to its `low` and `high` (either
may be missing) and the `runs` that they come from: a list of the figure's values, one a seed. Exit
code: 0 within the bounds, 1 outside, 2 a run that is not finished, 3 no bounds for this model.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from jaxgrpo.records.run_directory import RunDirectory, read_jsonl

LAST_STEPS = 10
"""Figures of single steps are means over the last so many."""
STEP_FIGURES = {
    "last_rewards": "reward",
    "mean_completion_length": "completions/mean_length",
    "sampler_difference": "sampling/sampling_logp_difference/mean",
}


def read_figures(run_dir: Path) -> dict[str, float]:
    """Accuracy after training, and three means over the last steps.

    Raises:
        ValueError: the run has not finished or evaluated nothing.
    """
    run = RunDirectory(run_dir)
    if not run.summary.is_file():
        raise ValueError(f"{run_dir} holds no finished run: there is no {run.summary.name}")
    after = json.loads(run.summary.read_text("utf-8"))["eval_after"]
    if after is None:
        raise ValueError(f"{run_dir}: the run evaluated nothing")
    steps = [row for row in read_jsonl(run.metrics) if "reward" in row][-LAST_STEPS:]
    if not steps:
        raise ValueError(f"{run_dir}: {run.metrics.name} holds no training step")
    means = {
        name: math.fsum(row[key] for row in steps) / len(steps)
        for name, key in STEP_FIGURES.items()
    }
    return {"accuracy_after": after["eval/accuracy"]} | means


def judge(figures: dict[str, float], bounds: dict[str, dict]) -> tuple[list[str], bool]:
    """A line a figure, and whether all lie within their bounds; what is not a number does not."""
    lines, passed = [], True
    for name, value in figures.items():
        limits = bounds.get(name, {})
        low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
        within = low <= value <= high
        passed &= within
        line = f"{name:24} {value:10.5g}"
        if limits:
            line += f"   {'within' if within else 'OUTSIDE'} {low:g} to {high:g}"
            line += f", from {len(limits.get('runs', []))} runs"
        lines.append(line)
    return lines, passed


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    run_dir, model, bounds_path = arguments
    try:
        figures = read_figures(Path(run_dir))
        bounds = json.loads(Path(bounds_path).read_text("utf-8")).get(model, {})
        if unknown := set(bounds) - set(figures):
            raise ValueError(f"{bounds_path}: {model} has bounds for {', '.join(sorted(unknown))}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines, passed = judge(figures, bounds)
    print("\n".join(lines))
    if not bounds:
        print(f"{bounds_path} holds no bounds for {model}: nothing was held against anything")
        return 3
    print("the gate is passed" if passed else "the gate is NOT passed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

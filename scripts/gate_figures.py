"""Holds four figures of a finished run against earlier runs: what scripts/gate_gsm8k.sh ends with.

    python scripts/gate_figures.py RUN_DIR MODEL BOUNDS.json

MODEL as model.path. BOUNDS.json maps a model's name to the `weights_sha256` by which it is known
(jaxgrpo/model/weights.py), what its runs were `measured` on, and the `runs`: a figure's values, one
a seed. A figure is within its bounds if it lies in the 99 % prediction interval for one more run
(mean +- t(n - 1) sd sqrt(1 + 1 / n); on one side where only that side is a fault). Exit code: 0
within the bounds, 1 outside, 2 a run that is not finished or a file that does not fit, 3 no bounds
for these weights.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from scipy.special import stdtrit

from jaxgrpo.config import ConfigError
from jaxgrpo.model.weights import resolve_model_dir, weights_sha256
from jaxgrpo.records.run_directory import RunDirectory, read_jsonl

CONFIDENCE = 0.99
LAST_STEPS = 10
"""Figures of single steps are means over the last so many."""
FAULTS = {
    "accuracy_after": "low",
    "last_rewards": "low",
    "mean_completion_length": "low or high",
    "sampler_difference": "high",
}
"""Each figure, and on which side of its bounds it is a fault."""
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


def bounds_of(runs: Sequence[float], faults: str) -> tuple[float, float]:
    """Between which values one more run lies, with CONFIDENCE, if it is as the given ones are.

    Args:
        faults: `low`, `high`, or both; without a fault on a side there is no bound.
    """
    mean, sides = statistics.fmean(runs), 1 + (faults == "low or high")
    t = float(stdtrit(len(runs) - 1, 1 - (1 - CONFIDENCE) / sides))
    reach = t * statistics.stdev(runs) * math.sqrt(1 + 1 / len(runs))
    return (
        mean - reach if "low" in faults else -math.inf,
        mean + reach if "high" in faults else math.inf,
    )


def judge(figures: dict[str, float], runs: dict[str, Sequence[float]]) -> tuple[list[str], bool]:
    """A line a figure, and whether all lie within their bounds; what is not a number does not."""
    lines, passed = [], True
    for name, value in figures.items():
        low, high = bounds_of(runs[name], FAULTS[name])
        within = low <= value <= high
        passed &= within
        asked = [f"at least {low:.4g}"] if low > -math.inf else []
        asked += [f"at most {high:.4g}"] if high < math.inf else []
        mean, sd = statistics.fmean(runs[name]), statistics.stdev(runs[name])
        lines.append(
            f"{name:24} {value:10.5g}   {'within' if within else 'OUTSIDE'}: {' and '.join(asked)}"
            f" ({len(runs[name])} runs, mean {mean:.4g}, sd {sd:.2g})"
        )
    return lines, passed


def read_bounds(path: Path, sha256: str) -> tuple[str, dict[str, Sequence[float]]] | None:
    """The name of the weights with this digest, and each figure's runs; None without bounds.

    Raises:
        ValueError: the figures are not those of FAULTS, or have fewer than two runs.
    """
    for name, held in json.loads(path.read_text("utf-8")).items():
        if held["weights_sha256"] != sha256:
            continue
        if set(held["runs"]) != set(FAULTS):
            raise ValueError(f"{path}: {name} needs runs of {', '.join(sorted(FAULTS))}")
        if min(map(len, held["runs"].values())) < 2:
            raise ValueError(f"{path}: {name} needs at least two runs of each figure")
        return name, held["runs"]
    return None


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    run_dir, model, path = Path(arguments[0]), arguments[1], Path(arguments[2])
    try:
        figures = read_figures(run_dir)
        sha256 = weights_sha256(resolve_model_dir(model))
        found = read_bounds(path, sha256)
    except (OSError, ValueError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if found is None:
        print("\n".join(f"{name:24} {value:10.5g}" for name, value in figures.items()))
        print(f"{path} holds no runs of the weights {sha256}: nothing was held against anything")
        return 3
    name, runs = found
    lines, passed = judge(figures, runs)
    print("\n".join([name, *lines]))
    print("the gate is passed" if passed else "the gate is NOT passed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

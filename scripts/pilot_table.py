"""The tables of docs/study_qwen/README.md from docs/study_qwen/pilot.json.

    python scripts/pilot_table.py docs/study_qwen/pilot.json [RUN_DIR ...]

Run directories of the pilot are added to the record first.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.config_files import load_config
from jaxgrpo.records.run_directory import RunDirectory, read_jsonl
from jaxgrpo.study.norms import layer_norms, read_norms

SERIES = {
    "reward": "reward",
    "mean_length": "completions/mean_length",
    "clipped_ratio": "completions/clipped_ratio",
    "entropy": "entropy",
    "rows_trained": "grpo/frac_rows_trained",
    "padding": "packing/padding",
    "rollout_s": "time/rollout_s",
    "train_s": "time/train_s",
}
ACCURACY = ("accuracy", "accuracy_low", "accuracy_high", "lm_eval_strict", "lm_eval_flexible")


def summarise(root: Path) -> dict[str, Any]:
    """Of a finished run: means over ten steps, evaluations, the layers' shares."""
    files = RunDirectory(root)
    config = load_config([files.config])
    records = read_jsonl(files.metrics)
    steps = [record for record in records if "step_time" in record]
    seconds = [after["time"] - before["time"] for before, after in itertools.pairwise(steps)]
    drift = [step["sampling/sampling_logp_difference/mean"] for step in steps]
    norms = read_norms(root, "l2")
    assert norms is not None, f"{root} has no norms"
    thirds = [part.sum(axis=0) for part in np.array_split(layer_norms(norms), 3)]

    def tens(name: str) -> list[float]:
        return [
            round(statistics.fmean(step[name] for step in steps[i : i + 10]), 4)
            for i in range(0, len(steps), 10)
        ]

    def evaluation(step: int) -> dict[str, Any]:
        found = next(r for r in records if r["step"] == step and "eval/accuracy" in r)
        return {
            decoding: {name: found[f"{prefix}{name}"] for name in ACCURACY}
            for decoding, prefix in (("sampled", "eval/"), ("greedy", "eval/greedy_"))
        }

    return {
        "learning_rate": config.optim.learning_rate,
        "seed": config.seed,
        "steps": len(steps),
        **{short: tens(name) for short, name in SERIES.items()},
        "mean_step_s": round(statistics.fmean(seconds), 3),
        "median_step_s": round(statistics.median(seconds), 3),
        "drift_first": round(drift[0], 5),
        "drift_largest": round(max(drift), 5),
        "evaluation": {"before": evaluation(0), "after": evaluation(len(steps))},
        "layer_shares_by_third": [
            [round(float(x), 5) for x in part / part.sum()] for part in thirds
        ],
    }


def accuracy(found: dict, decoding: str) -> str:
    """Before to after, with Wilson's interval for the questions."""
    if not found or decoding not in found["after"]:
        return "not brought back" if not found else "not measured"
    before, after = found["before"][decoding], found["after"][decoding]
    return (
        f"{before['accuracy']:.1%} to {after['accuracy']:.1%} "
        f"({after['accuracy_low']:.1%} to {after['accuracy_high']:.1%})"
    )


def tables(record: dict) -> str:
    """Two Markdown tables: how each run went, and how its layers' gradients were spread."""
    lines = [
        "| learning rate | seed | reward, steps 1-10 / 31-40 / 71-80 "
        "| greedy accuracy, before to after | of four samples "
        "| rows trained, first / last ten | mean step after the first | largest drift / first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in record["runs"].values():
        greedy, sampled = (accuracy(run["evaluation"], kind) for kind in ("greedy", "sampled"))
        reward, trained = run["reward"], run["rows_trained"]
        lines.append(
            f"| {run['learning_rate']:g} | {run['seed']} "
            f"| {reward[0]:.2f} / {reward[3]:.2f} / {reward[7]:.2f} | {greedy} | {sampled} "
            f"| {trained[0]:.0%} / {trained[-1]:.0%} | {run['mean_step_s']:.2f} s "
            f"| {run['drift_largest'] / run['drift_first']:.2f} |"
        )
    lines += [
        "",
        "| learning rate | seed | largest over smallest share, by thirds of the run "
        "| largest in the last third | smallest in the last third |",
        "|---|---|---|---|---|",
    ]
    for run in record["runs"].values():
        thirds = run["layer_shares_by_third"]
        order = sorted(range(len(thirds[-1])), key=lambda layer: -thirds[-1][layer])
        lines.append(
            f"| {run['learning_rate']:g} | {run['seed']} "
            f"| {', '.join(f'{max(shares) / min(shares):.2f}' for shares in thirds)} "
            f"| {', '.join(map(str, order[:5]))} | {', '.join(map(str, order[:-6:-1]))} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    pilot = json.loads(path.read_text(encoding="utf-8"))
    for root in map(Path, sys.argv[2:]):
        pilot["runs"][root.name] = summarise(root)
    if sys.argv[2:]:
        path.write_text(json.dumps(pilot, indent=1) + "\n", encoding="utf-8")
    print(tables(pilot))

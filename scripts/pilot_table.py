"""The tables of docs/study_qwen/README.md from docs/study_qwen/pilot.json.

python scripts/pilot_table.py docs/study_qwen/pilot.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def tables(record: dict) -> str:
    """Two Markdown tables: how each run went, and how its layers' gradients were spread."""
    lines = [
        "| learning rate | seed | reward, steps 1-10 / 31-40 / 71-80 "
        "| greedy accuracy, before to after | rows trained, first / last ten "
        "| mean step after the first | largest drift / first |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in record["runs"].values():
        found = run["evaluation"]
        accuracy = "not brought back"
        if found:
            before, after = found["before"], found["after"]
            accuracy = (
                f"{before['accuracy']:.1%} to {after['accuracy']:.1%} "
                f"({after['accuracy_low']:.1%} to {after['accuracy_high']:.1%})"
            )
        reward, trained = run["reward"], run["rows_trained"]
        lines.append(
            f"| {run['learning_rate']:g} | {run['seed']} "
            f"| {reward[0]:.2f} / {reward[3]:.2f} / {reward[7]:.2f} | {accuracy} "
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
    print(tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

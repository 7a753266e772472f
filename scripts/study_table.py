"""The tables of docs/study_qwen/README.md from a design's results.json.

python scripts/study_table.py docs/study_qwen/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxgrpo.study.design import CELLS

LETTERS = {"uniform": "U", "ranks_only": "N", "speeds_only": "D", "proportional": "P"}


def tables(results: dict[str, Any]) -> str:
    """Two Markdown tables: the outcome of every run by block, and the planned contrasts."""
    arms = {arm["plan"]: arm for arm in results["arms"]}
    first = arms["uniform"]
    lines = [
        "| block and seed | learning rate | " + " | ".join(LETTERS[cell] for cell in CELLS) + " |",
        "|---|---|" + "---|" * len(CELLS),
    ]
    for row, (seed, rate) in enumerate(zip(first["seeds"], first["learning_rates"], strict=True)):
        found = (f"{arms[cell]['per_seed'][row]:.1%}" for cell in CELLS)
        lines.append(f"| {seed} | {rate:g} | {' | '.join(found)} |")
    means = (f"{arms[cell]['accuracy']:.1%}" for cell in CELLS)
    lines.append(f"| mean | | {' | '.join(means)} |")
    lines += [
        "",
        "| contrast | difference | interval | p | verdict | change with twice the learning rate |",
        "|---|---|---|---|---|---|",
    ]
    slopes = {one["name"]: one for one in results["design"]["interactions"]}
    for contrast in results["contrasts"]:
        slope = slopes[contrast["name"]]
        lines.append(
            f"| {contrast['name']} | {100 * contrast['difference']:+.1f} points "
            f"| {100 * contrast['low']:+.1f} to {100 * contrast['high']:+.1f} "
            f"at {100 * contrast['confidence']:.4g} % | {contrast['p_holm']:.2g} "
            f"({contrast['df']:.3g} df) | {contrast['verdict']} "
            f"| {100 * slope['slope']:+.1f} ({100 * slope['low']:+.1f} to "
            f"{100 * slope['high']:+.1f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

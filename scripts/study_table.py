"""The tables of docs/study_qwen/README.md from a design's results.json.

python scripts/study_table.py docs/study_qwen/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxgrpo.study.design import CELLS
from jaxgrpo.study.paper import PAPER

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
            f"| {_at_its_level(contrast)} | {contrast['p_holm']:.2g} "
            f"({contrast['df']:.3g} df) | {contrast['verdict']} "
            f"| {100 * slope['slope']:+.1f} ({_interval(slope)}) |"
        )
    return "\n".join(lines)


def claims(results: dict[str, Any]) -> str:
    """The paper's claims beside what this study has of them, as a Markdown table."""
    primary = results["contrasts"][0]
    spread = {found["run"]: found for found in results["spread"]}
    own = {run: found["own"][-1] for run, found in spread.items()}
    foretold = {run: found["foretold"]["value"] for run, found in spread.items()}
    uniform, seeds = spread["proportional"]["uniform"][-1], spread["proportional"]["seeds"]
    profile = results["profiles"][0]
    view = profile["views"]["l2"]
    ratio = view["max_min"]
    (landscape,) = (found for found in results["landscape"] if found["objective"] == "grpo")
    top, alike = landscape["top_share"], landscape["early_late"]
    over = f"{seeds} seeds, {profile['steps']} steps"
    theirs = PAPER["proportional"] - PAPER["uniform"]
    outside = not primary["low"] <= theirs <= primary["high"]
    blocks = len(primary["per_seed"])
    rows = [
        (
            "Proportional ranks lose to uniform ones under GRPO",
            f"{PAPER['proportional']:.1%} against {PAPER['uniform']:.1%}: "
            f"{100 * theirs:+.1f} points (200 problems, 1 seed)",
            f"{100 * primary['difference']:+.1f} points ({_at_its_level(primary)}; "
            f"{blocks} seeds, {results['arms'][0]['n_items']:,} problems, "
            "`constant`)",
            primary["verdict"] + f", but {100 * theirs:+.1f} lies outside the interval" * outside,
            f"blocks {blocks + 1} to {results['design']['looks'][-1]['blocks']} of this study",
        ),
        (
            "Random and reduced ranks lose more",
            f"{PAPER['random']:.1%} and {PAPER['reduced']:.1%}",
            "not run",
            "open",
            "`configs/study_qwen_neighbours.yaml`",
        ),
        (
            "GRPO's gradient is spread flatly over layers: largest over smallest share",
            f"{PAPER['max_min_uniform']:.2f} (and more than 10 quoted of supervised training)",
            f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f} over the profile's "
            f"steps); uniform runs {_ranged(uniform)} ({over})",
            "flat here too, less so; against supervised training open",
            "a supervised profile on the same questions",
        ),
        (
            "The top 30 % of layers hold a third of it; the map is stable from early to late",
            f"{PAPER['top_share']:.1%}; correlation {PAPER['early_late']}",
            f"{top['value']:.1%} ({top['low']:.1%} to {top['high']:.1%}); correlation "
            f"{alike['value']:.3f} ({alike['low']:.3f} to {alike['high']:.3f}) "
            f"(uniform runs, ranges over {over})",
            "stability holds; the share is larger here",
            "another task",
        ),
        (
            "Proportional ranks amplify the differences between layers",
            f"{PAPER['max_min_uniform']:.2f} becomes {PAPER['max_min_proportional']:.2f}",
            f"{_ranged(uniform)} becomes {_ranged(own['proportional'])} ({over})",
            "holds as a number (ranks 8 to 27 here, 20 to 40 there)",
            "`configs/study_qwen_paper.yaml`, at its ranks",
        ),
        (
            "... because rank draws gradient",
            "said to be a feedback",
            "LoRA's algebra makes of the uniform runs "
            f"{foretold['proportional']:.2f} (P), {foretold['speeds_only']:.2f} (D), "
            f"{foretold['ranks_only']:.2f} (N), and seen are {own['proportional']['value']:.2f}, "
            f"{own['speeds_only']['value']:.2f}, {own['ranks_only']['value']:.2f}: most where no "
            "rank moved, least where P's ranks are at equal speeds",
            "no sign of it; the test of drawn ranks is open",
            "the probes",
        ),
    ]
    heads = ("claim", "arXiv 2605.07366", "here", "verdict", "what would change it")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _interval(found: dict[str, Any]) -> str:
    return f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"


def _at_its_level(contrast: dict[str, Any]) -> str:
    return f"{_interval(contrast)} at {100 * contrast['confidence']:.4g} %"


def _ranged(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


if __name__ == "__main__":
    record = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(tables(record), claims(record), sep="\n\n")

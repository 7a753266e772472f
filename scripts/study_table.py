"""The tables of docs/study_qwen/README.md from the results.json of its three studies.

python scripts/study_table.py docs/study_qwen
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxgrpo.study.design import CELLS
from jaxgrpo.study.paper import PAPER

LETTERS = {"uniform": "U", "ranks_only": "N", "speeds_only": "D", "proportional": "P"}


HOT, COLD = (15, 16, 17, 18, 27, 11), (26, 24, 25, 22, 23)
"""Layers of arXiv 2605.07366's figure, the largest and the smallest shares first."""


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
        "| contrast | difference | interval | p | margin, p outside it | verdict "
        "| change with twice the learning rate |",
        "|---|---|---|---|---|---|---|",
    ]
    slopes = {one["name"]: one for one in results["design"]["interactions"]}
    for contrast in results["contrasts"]:
        slope = slopes[contrast["name"]]
        lines.append(
            f"| {contrast['name']} | {100 * contrast['difference']:+.1f} points "
            f"| {_at_its_level(contrast)} | {contrast['p_holm']:.2g} "
            f"({contrast['df']:.3g} df) | {100 * contrast['margin']:g} points, "
            f"{contrast['p_equivalent']:.2g} (needs {contrast['equivalent_at']:.2g}) "
            f"| {contrast['verdict']} "
            f"| {100 * slope['slope']:+.1f} ({_interval(slope)}) |"
        )
    return "\n".join(lines)


def ranks_table(results: dict[str, Any]) -> str:
    """Uniform arms by rank, as a Markdown table."""
    seeds = results["arms"][0]["seeds"]
    columns = [f"seed {seed}" for seed in seeds]
    lines = [
        f"| rank | parameters | {' | '.join(columns)} | mean | less that of the largest |",
        "|---|---|" + "---|" * len(seeds) + "---|---|",
    ]
    versus = {found["name"].split(" - ")[0]: found for found in results["contrasts"]}
    for arm in results["arms"]:
        runs = " | ".join(f"{accuracy:.1%}" for accuracy in arm["per_seed"])
        less = ""
        if found := versus.get(arm["name"]):
            less = (
                f"{100 * found['difference']:+.1f} points ({_at_its_level(found)}, "
                f"p = {found['p_holm']:.2g}, {found['df']:.3g} df): {found['verdict']}"
            )
        lines.append(
            f"| {arm['mean_rank']} | {arm['trainable_parameters']:,} | {runs} "
            f"| {arm['accuracy']:.1%} | {less} |"
        )
    return "\n".join(lines)


def landscape_table(results: dict[str, Any]) -> str:
    """Profiles of both objectives: how unevenly each spreads the gradient, as a Markdown table."""
    lines = [
        "| profile | largest over smallest layer share | top 8 of 28 layers hold | early/late "
        "correlation | the same of the frozen weight's gradient |",
        "|---|---|---|---|---|",
    ]
    for profile in results["profiles"]:
        raw, weight = (_spread(profile["views"][view]) for view in ("l2", "weight"))
        lines.append(
            f"| {profile['objective'].upper()} | {' | '.join(raw)} | {', '.join(weight)} |"
        )
    return "\n".join(lines)


def claims(results: dict[str, Any], landscape: dict[str, Any]) -> str:
    """The paper's claims beside what these studies have of them, as a Markdown table."""
    primary = results["contrasts"][0]
    spread = {found["run"]: found for found in results["spread"]}
    own = {run: found["own"][-1] for run, found in spread.items()}
    foretold = {run: found["foretold"]["value"] for run, found in spread.items()}
    uniform, seeds = spread["proportional"]["uniform"][-1], spread["proportional"]["seeds"]
    (found,) = (found for found in results["landscape"] if found["objective"] == "grpo")
    top, alike = found["top_share"], found["early_late"]
    profiles = {one["objective"]: one["views"]["l2"] for one in landscape["profiles"]}
    steps = results["profiles"][0]["steps"]
    over = f"{seeds} seeds, {steps} steps"
    theirs = PAPER["proportional"] - PAPER["uniform"]
    outside = not primary["low"] <= theirs <= primary["high"]
    verdict = primary["verdict"]
    if verdict == "equivalent":
        verdict = f"does not hold here: equivalent within {100 * primary['margin']:g} points"
    order = sorted(range(len(shares := profiles["grpo"]["share"])), key=lambda n: -shares[n])
    hot, cold = order[: len(HOT)], order[: -len(COLD) - 1 : -1]
    slope = {one["view"]: one for one in results["amplification"]}
    rows = [
        (
            "Proportional ranks lose to uniform ones under GRPO",
            f"{PAPER['proportional']:.1%} against {PAPER['uniform']:.1%}: "
            f"{100 * theirs:+.1f} points (200 problems, 1 seed)",
            f"{100 * primary['difference']:+.1f} points ({_at_its_level(primary)}; "
            f"{len(primary['per_seed'])} seeds, {results['arms'][0]['n_items']:,} problems, "
            "`constant`)",
            verdict + f", and {100 * theirs:+.1f} lies outside the interval" * outside,
            "the paper's own ranks and number of steps, another profile's plan, another task",
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
            f"GRPO {_ranged(profiles['grpo']['max_min'])}, supervised "
            f"{_ranged(profiles['sft']['max_min'])} (a profile each, {steps} steps, intervals "
            f"over steps); uniform GRPO runs {_ranged(uniform)} ({over})",
            "flat under both; the contrast with supervised training does not hold here",
            "supervised runs of more seeds; another data set",
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
            "Which layers have most and least",
            f"{_layers(HOT)}; {_layers(COLD)}",
            f"{_layers(hot)}; {_layers(cold)} (GRPO profile)",
            f"holds for {len({*hot} & {*HOT})} of the {len(HOT)} hottest, "
            f"{len({*cold} & {*COLD})} of the {len(COLD)} coldest",
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
            f"by drawn ranks a share goes with rank to the power {_power(slope['l2'])}, where "
            f"algebra alone makes 0.5, and the frozen weight's with {_power(slope['weight'])}, "
            f"where it makes 0 ({drawn(results)}, {steps} steps); "
            f"of the uniform runs algebra makes {foretold['proportional']:.2f} (P), "
            f"{foretold['speeds_only']:.2f} (D), {foretold['ranks_only']:.2f} (N), and seen are "
            f"{own['proportional']['value']:.2f}, {own['speeds_only']['value']:.2f}, "
            f"{own['ranks_only']['value']:.2f}",
            "does not hold here: no feedback of 0.1 or more in the power",
            "the other draws; longer training",
        ),
    ]
    heads = ("claim", "arXiv 2605.07366", "here", "verdict", "what would change it")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def drawn(results: dict[str, Any]) -> str:
    """Of how many draws the slopes are: "3 of 6 draws"."""
    said = (x for x in results["amplification_verdict"] if x.startswith("Measured in "))
    return next(said).removeprefix("Measured in ").rstrip(".")


def rounds_table(root: Path) -> str:
    """What runs took that were trained together, as a Markdown table; of archives that
    scripts/pack_study.py made."""
    rounds: dict[float, dict[str, list]] = {}
    for part in ("stage1_runs.tar.xz", "ranks/runs.tar.xz", "landscape/runs.tar.xz"):
        for name, summary, metrics in _runs(root / part):
            # Runs of before say nothing of their start.
            if "start" in summary:
                rounds.setdefault(summary["start"]["began"], {})[name] = [summary, metrics]
    lines = [
        "| runs | a step | from process start to the last record | peak |",
        "|---|---|---|---|",
    ]
    for began, runs in sorted(rounds.items()):
        summary, metrics = next(iter(runs.values()))
        steps = [row["step_time"] for row in metrics if "step_time" in row][1:]
        seconds = max(rows[-1]["time"] for _, rows in runs.values()) - began
        peak = max(found["peak_memory_bytes"] for found, _ in runs.values()) / 2**30
        names = ", ".join(sorted(runs))
        lines.append(
            f"| {names} | {sum(steps) / len(steps):.1f} s "
            f"| {seconds // 60:.0f} min {seconds % 60:.0f} s | {peak:.1f} GiB |"
        )
    return "\n".join(lines)


def _runs(path: Path) -> Iterator[tuple[str, dict, list[dict]]]:
    """(name, summary, metrics) of every run in an archive."""
    with tarfile.open(path) as archive:
        found: dict[str, dict[str, str]] = {}
        for member in archive:
            place = Path(member.name)
            if place.name in ("summary.json", "metrics.jsonl"):
                data = archive.extractfile(member)
                assert data is not None
                found.setdefault(str(place.parent), {})[place.name] = data.read().decode()
    for place, texts in found.items():
        name = place.removeprefix("arms/")
        metrics = [json.loads(line) for line in texts["metrics.jsonl"].splitlines()]
        yield name, json.loads(texts["summary.json"]), metrics


def _spread(view: dict[str, Any]) -> tuple[str, str, str]:
    top = view["top_share"]
    held = f"{top['value']:.1%} ({top['low']:.1%} to {top['high']:.1%})"
    return (_ranged(view["max_min"]), held, f"{view['early_late_correlation']:.3f}")


def _layers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _power(found: dict[str, Any]) -> str:
    return f"{found['slope']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _interval(found: dict[str, Any]) -> str:
    return f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"


def _at_its_level(contrast: dict[str, Any]) -> str:
    return f"{_interval(contrast)} at {100 * contrast['confidence']:.4g} %"


def _ranged(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def read(root: Path) -> list[dict[str, Any]]:
    """What the main study, that of ranks and that of the landscape found."""
    paths = (root / part / "results.json" for part in ("", "ranks", "landscape"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


if __name__ == "__main__":
    main, ranks, landscape = read(Path(sys.argv[1]))
    print(tables(main), ranks_table(ranks), landscape_table(landscape), sep="\n\n", end="\n\n")
    print(claims(main, landscape), rounds_table(Path(sys.argv[1])), sep="\n\n")

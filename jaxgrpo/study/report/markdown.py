"""report.md: what report.html says, as text and tables for terminals and code hosts."""

from __future__ import annotations

import re

from jaxgrpo.study.report import facts, tables
from jaxgrpo.study.report.facts import NONE, NOT_MEASURED
from jaxgrpo.study.report.tables import Table

# What Markdown or HTML inside it would take for markup. Underscores within words are safe.
_SPECIAL = re.compile(r"([\\`*|<>\[\]])")


def plain(value: object) -> str:
    """Text that shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def table(content: Table, heading: str) -> list[str]:
    lines = [f"## {heading}", ""]
    if not content.rows:
        return [*lines, f"{NOT_MEASURED.capitalize()} yet.", ""]
    return [*lines, *_rows(content), ""]


def _rows(content: Table) -> list[str]:
    sides = ["---" if i < content.texts else "---:" for i in range(len(content.headings))]
    lines = [content.headings, sides, *content.rows]
    texts = [[cell if i == 1 else plain(cell) for cell in row] for i, row in enumerate(lines)]
    return ["| " + " | ".join(row) + " |" for row in texts]


def render_markdown(results: dict) -> str:
    """The whole file, the question first and the verdict next."""
    lines = [f"# {plain(results['question'])}", ""]
    for topic, (head, *rest) in facts.answers(results):
        lines += [f"**{topic}: {plain(head)}**", ""]
        lines += [f"{plain(sentence)}\n" for sentence in rest]
    lines += [f"- {plain(name)}: {plain(value)}" for name, value in facts.key_figures(results)]
    lines.append("")
    lines += table(tables.accuracy_table(results), "Held-out accuracy per arm")
    detectable = results["minimum_detectable_effect"]
    size = "not measured yet" if detectable is None else f"{100 * detectable:.1f} points"
    note = f" ({plain(results['detectable_note'])})" if detectable is not None else ""
    lines += [f"Minimum detectable effect: {size}{note}.", ""]
    lines += [f"{NONE} means not applicable or not measured.", ""]
    slopes = "Gradient amplification: slope of ln share ratio on ln rank"
    lines += table(tables.slope_table(results), slopes)
    lines += table(tables.concentration_table(results), "How unevenly the gradient is spread")
    lines += table(tables.share_table(results), "Share of the gradient norm per layer")
    lines += table(tables.allocation_table(results), "Where each plan puts its ranks")
    lines += table(tables.training_table(results), "Reward, and drift between sampler and trainer")
    lines += table(tables.cost_table(results), "Cost, all seeds of an arm together")
    lines += table(tables.paper_table(results), "Beside the paper, arXiv 2605.07366")
    lines += table(tables.pair_table(results["settings"], "setting"), "Settings")
    lines += table(tables.pair_table(results["versions"], "package or device"), "Versions")
    lines.append(f"{plain(results['title'])}; report.html has the figures.")
    return "\n".join(lines) + "\n"

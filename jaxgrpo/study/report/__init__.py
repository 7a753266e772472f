"""A study's results as report.html and report.md; from the results alone, so no jax."""

from __future__ import annotations

from pathlib import Path

from jaxgrpo.records.run_directory import atomic_write_text
from jaxgrpo.study.report.markdown import render_markdown
from jaxgrpo.study.report.page import render_page


def write_report(results: dict, root: Path) -> None:
    """Writes both files into `root`, each at once; what is not measured yet says so.

    Args:
        results: what `results.collect_results` returns, or the same read from results.json.
    """
    root = Path(root)
    atomic_write_text(root / "report.html", render_page(results))
    atomic_write_text(root / "report.md", render_markdown(results))

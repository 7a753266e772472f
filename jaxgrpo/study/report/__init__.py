"""A study's results as report.html and report.md; from the results alone, so no jax."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jaxgrpo.records.run_directory import atomic_write_text
from jaxgrpo.study.report import facts
from jaxgrpo.study.report.canvas import to_svg
from jaxgrpo.study.report.document import Chart, Table
from jaxgrpo.study.report.sections import make_sections
from jaxgrpo.study.result_types import Results

# What Markdown or HTML inside it would take for markup. Underscores within words are safe.
_SPECIAL = re.compile(r"([\\`*|<>\[\]])")


def write_report(results: Results, root: Path) -> None:
    """Writes both files into `root`, each at once.

    report.html needs nothing else, neither a network nor a script.

    Args:
        results: what `results.collect_results` returns, or the same read from results.json.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name != "report.md.jinja",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests |= {kind.__name__: partial(_is, kind) for kind in (Table, Chart)}
    environment.filters["plain"] = _plain
    environment.globals |= {"facts": facts, "svg": partial(_svg, results)}
    for name in ("report.html", "report.md"):
        template = environment.get_template(f"{name}.jinja")
        text = template.render(results=results, sections=make_sections(results))
        atomic_write_text(Path(root) / name, text + "\n")


def _is(kind: type, part: object) -> bool:
    return isinstance(part, kind)


def _svg(results: Results, chart: Chart, width: str) -> str:
    draw = partial(chart.draw, results)
    label = f"{chart.title}. {chart.caption}"
    return to_svg(draw, width == "narrow", f"{chart.id}-{width}", label)


def _plain(value: object) -> str:
    """Text that shows in Markdown as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))

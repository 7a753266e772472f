"""What `study` prints at its end."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from jaxgrpo.study.gradient_types import Profile
from jaxgrpo.study.result_types import Contrast, CutResult, Results


def print_verdict(results: Results, console: Console) -> None:
    """The answer, and accuracy per arm."""
    table = Table(title="held-out accuracy", title_justify="left")
    headings = ("arm", "accuracy", "95 % interval", "versus its reference", "interval", "p", "is")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in results["arms"]:
        versus = arm["versus"]
        table.add_row(
            arm["name"],
            _percent(arm["accuracy"]),
            f"{_percent(arm['low'])} to {_percent(arm['high'])}",
            "" if versus is None else f"{100 * versus['difference']:+.1f} points",
            "" if versus is None else _interval(versus),
            "" if versus is None or versus["p_holm"] is None else f"{versus['p_holm']:.2g}",
            "" if versus is None else versus["verdict"],
        )
    console.print(table)
    if results["cuts"]:
        console.print(_cuts(results["cuts"]))
    for sentence in (
        *results["verdict"],
        *results["amplification_verdict"],
        *map(_importance_line, results["profiles"]),
    ):
        console.print(sentence, highlight=False)


def _cuts(cuts: list[CutResult]) -> Table:
    table = Table(title="cut after training (PARA), by seed", title_justify="left")
    for heading in ("what is left", "parameters", "accuracy", "cut - uncut, points"):
        table.add_column(heading, justify="left" if heading == "what is left" else "right")
    for cut in cuts:
        table.add_row(
            cut["name"],
            ", ".join(f"{n:,}" for n in cut["parameters"]),
            ", ".join(f"{x:.1%}" for x in cut["accuracy"]),
            ", ".join(f"{100 * x:+.1f}" for x in cut["difference"]),
        )
    return table


def _interval(versus: Contrast) -> str:
    low, high = versus["low"], versus["high"]
    return "" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"


def _importance_line(profile: Profile) -> str:
    found = profile["views"]["l2"]
    ratio, top = found["max_min"], found["top_share"]
    return (
        f"{profile['objective'].upper()} profile, raw L2: largest over smallest layer share "
        f"{_number(ratio['value'])} ({_number(ratio['low'])} to {_number(ratio['high'])}), the top "
        f"{top['layers']} of {profile['layers']} layers hold {top['value']:.1%}."
    )


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"

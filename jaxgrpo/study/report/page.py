"""report.html: one file that needs nothing else, neither a network nor a script."""

from __future__ import annotations

from jaxgrpo.study.report import facts, figures, tables
from jaxgrpo.study.report.facts import NONE, NOT_MEASURED
from jaxgrpo.study.report.figures import Figure
from jaxgrpo.study.report.layer_charts import LEVELS
from jaxgrpo.study.report.plot import escape, rect
from jaxgrpo.study.report.tables import Table
from jaxgrpo.study.report.theme import style_sheet

SIZES = (("wide", 960), ("middle", 620), ("narrow", 350))
"""Every chart is drawn for a desktop, a tablet and a phone; the style sheet shows one of them."""

AMPLIFICATION = (
    "The paper saw layers with more rank take a larger share of the gradient and called it "
    "amplification. LoRA's own algebra predicts some of that: with y = Wx + s·BAx an adapter's "
    "gradient grows as s·√r. A share then follows rank with a slope of +0.5 where s is constant, 0 "
    "where s = alpha/√r and −0.5 where s = alpha/r, without any feedback. Short runs at random "
    "ranks put this to the test. The gradient of the frozen weight holds neither s nor r: only a "
    "real feedback can tilt it."
)
LAYERS = (
    "Gradient norms measured in short runs at the same rank in every layer. Raw L2 is the norm of "
    "the adapters' gradients; rank-free divides it by s·√r; per parameter by the root of their "
    "number; full weight is the norm of the frozen weight's gradient, in which no adapter occurs."
)


class Page:
    """Puts the parts one after another and numbers the figures."""

    def __init__(self, results: dict) -> None:
        self.results = results
        self._figures = 0

    def figure(self, figure: Figure) -> str:
        self._figures += 1
        drawings = [(cls, figure.draw(self.results, w)) for cls, w in SIZES]
        head = f"<h3><span>Figure {self._figures}</span>{escape(figure.title)}</h3>"
        if not all(drawing for _, drawing in drawings):
            body = f'<p class="absent">{NOT_MEASURED.capitalize()} yet.</p>'
            return f'<figure id="{figure.id}">{head}{body}</figure>'
        charts = "".join(f'<div class="chart {cls}">{d}</div>' for cls, d in drawings)
        caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
        more = ""
        if figure.numbers is not None and figure.numbers.rows:
            inside = table(figure.numbers, f"Numbers of figure {self._figures}")
            more = f"<details><summary>Numbers</summary>{inside}</details>"
        key = self._colours() if figure.scale else legend(figure)
        return f'<figure id="{figure.id}">{head}{key}{charts}{caption}{more}</figure>'

    def _colours(self) -> str:
        low, high = figures.scale_ends(self.results)
        cells = "".join(rect(16 * i, 0, 16, 14, f"d{i}") for i in range(LEVELS))
        drawing = f'<svg viewBox="0 0 176 14" class="heat" aria-hidden="true">{cells}</svg>'
        empty = ""
        if figures.zero_steps(self.results):
            grey = f'<svg viewBox="0 0 14 14" style="width:14px">{rect(0, 0, 14, 14, "no-data")}'
            empty = f"{grey}</svg><span>no gradient in that step</span>"
        return f'<div class="scale"><span>{low}</span>{drawing}<span>{high}</span>{empty}</div>'


def legend(figure: Figure) -> str:
    entries = "".join(
        f"<li>{figures.swatch(key.shape, key.cls)}<span>{escape(key.name)}</span></li>"
        for key in figure.legend
    )
    return f'<ul class="legend">{entries}</ul>' if entries else ""


def table(content: Table, caption: str, kind: str = "") -> str:
    """A table in a container of its own, which scrolls where the page is too narrow for it."""
    head = "".join(
        f'<th scope="col"{_side(i, content)}>{escape(name)}</th>'
        for i, name in enumerate(content.headings)
    )
    rows = []
    for row in content.rows:
        cells = [f'<th scope="row" class="text">{escape(row[0])}</th>']
        for i, cell in enumerate(row[1:], start=1):
            missing = " missing" if cell in (NONE, NOT_MEASURED) else ""
            cls = ("text" if i < content.texts else "") + missing
            cells.append(f'<td class="{cls.strip()}">{escape(cell)}</td>' if cls else _plain(cell))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    name = escape(caption)
    # Focusable, so that a keyboard can scroll it.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table class="{kind}">'
        f"<caption>{name}</caption>{body}</table></div>"
    )


def _side(column: int, content: Table) -> str:
    return ' class="text"' if column < content.texts else ""


def _plain(cell: str) -> str:
    return f"<td>{escape(cell)}</td>"


def render_page(results: dict) -> str:
    """The whole file."""
    page = Page(results)
    sections = [
        ("accuracy-section", "Does an allocation help?", _accuracy(page)),
        ("amplification-section", "Does rank draw gradient?", _amplification(page)),
        ("layers-section", "Where the gradient is", _layers(page)),
        ("plans-section", "What the plans did with it", _plans(page)),
        ("training-section", "Training", _training(page)),
        ("paper-section", "Beside the paper", _paper(results)),
        ("settings-section", "Settings and versions", _settings(results)),
    ]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2>{content}</section>'
        for name, title, content in sections
    )
    title = escape(results["title"])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        # The page asks for nothing, and a browser holds it to that.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\"/>\n"
        '<link rel="icon" href="data:,"/>\n'
        f"<title>{title}</title>\n<style>{style_sheet()}</style>\n</head>\n<body>\n<main>\n"
        f'{_header(results)}<nav aria-label="Contents"><ol>{links}</ol></nav>\n{body}\n'
        f"<footer>{title} · {escape(facts.progress(results))} · Made by jaxgrpo from the study's "
        "own files; report.md holds the same numbers.</footer>\n</main>\n</body>\n</html>\n"
    )


def _header(results: dict) -> str:
    blocks = []
    for place, (topic, sentences) in enumerate(facts.answers(results)):
        head, *rest = sentences
        cls = "answer" + (" second" if place else " long" if len(head) > 110 else "")
        more = "".join(f"<p>{escape(sentence)}</p>" for sentence in rest)
        identity = ' id="verdict"' if place == 0 else ""
        blocks.append(
            f'<div class="verdict"><p class="topic">{topic}</p>'
            f'<p class="{cls}"{identity}>{escape(head)}</p>{more}</div>'
        )
    keys = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.key_figures(results)
    )
    question = escape(results["question"])
    return f'<header><h1>{question}</h1>{"".join(blocks)}<dl class="keys">{keys}</dl></header>\n'


def _accuracy(page: Page) -> str:
    results = page.results
    parts = [
        page.figure(figures.accuracy_figure(results)),
        page.figure(figures.difference_figure(results)),
        table(tables.accuracy_table(results), "Accuracy per arm"),
    ]
    detectable = results["minimum_detectable_effect"]
    note = "Minimum detectable effect: not measured yet."
    if detectable is not None:
        size = f"Minimum detectable effect: {100 * detectable:.1f} points"
        note = f"{size} ({results['detectable_note']})."
    parts.append(f'<p class="note">{escape(note)} {NONE} means not applicable or not measured.</p>')
    return "".join(parts)


def _amplification(page: Page) -> str:
    results = page.results
    sentences = [sentence for _, (sentence, *_) in facts.answers(results)[1:]]
    return (
        f"<p>{AMPLIFICATION}</p>"
        + "".join(f"<p><strong>{escape(sentence)}</strong></p>" for sentence in sentences)
        + page.figure(figures.slope_figure(results))
        + page.figure(figures.amplification_figure(results))
    )


def _layers(page: Page) -> str:
    results = page.results
    concentration = tables.concentration_table(results)
    parts = [
        f"<p>{LAYERS}</p>",
        page.figure(figures.heat_figure(results)),
        page.figure(figures.share_figure(results)),
    ]
    if concentration.rows:
        parts.append(table(concentration, "How unevenly the gradient is spread"))
    return "".join(parts)


def _plans(page: Page) -> str:
    results = page.results
    return page.figure(figures.allocation_figure(results)) + page.figure(
        figures.importance_figure(results)
    )


def _training(page: Page) -> str:
    results = page.results
    return (
        page.figure(figures.reward_figure(results))
        + page.figure(figures.drift_figure(results))
        + table(tables.cost_table(results), "Cost, all seeds of an arm together")
    )


def _paper(results: dict) -> str:
    intro = (
        "Published figures of arXiv 2605.07366 (Qwen2.5-1.5B-Instruct on GSM8K, 200 test items, "
        "one seed) and the same quantities here."
    )
    if not results["paper"]:
        return f'<p>{intro}</p><p class="absent">{NOT_MEASURED.capitalize()} yet.</p>'
    return f"<p>{intro}</p>{table(tables.paper_table(results), 'Paper and here', 'wraps')}"


def _settings(results: dict) -> str:
    versions = tables.pair_table(results["versions"], "package or device")
    if not versions.rows:
        versions = Table(versions.headings, [("versions", NOT_MEASURED)], texts=2)
    settings = tables.pair_table(results["settings"], "setting")
    return table(settings, "Settings", "wraps pairs") + table(versions, "Versions", "wraps pairs")

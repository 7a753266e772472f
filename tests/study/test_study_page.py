"""The study's page says what its records do."""

import json
from pathlib import Path

from scripts import pilot_table, study_table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "study_qwen"


def test_the_page_has_the_tables_of_the_pilot():
    record = json.loads((DOCS / "pilot.json").read_text(encoding="utf-8"))
    assert pilot_table.tables(record) in (DOCS / "README.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_and_verdicts_of_the_look():
    results = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    page = (DOCS / "README.md").read_text(encoding="utf-8")
    assert study_table.tables(results) in page and study_table.claims(results) in page
    assert f"`{results['design']['sha256'][:8]}...`" in page
    for found in results["spread"]:
        letter = study_table.LETTERS[found["run"]]
        foretold, seen = found["foretold"]["value"], found["own"][-1]["value"]
        assert f"{foretold:.2f} and {seen:.2f} for {letter}" in " ".join(page.split())
    sd = results["residual"]
    said = f"{100 * sd['sd']:.1f} points by itself ({100 * sd['low']:.1f} to {100 * sd['high']:.1f}"
    assert said in page and f"{100 * results['detectable']['value']:.1f} points with 80 %" in page

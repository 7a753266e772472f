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
    text = " ".join(page.split())
    for found in results["spread"]:
        letter = study_table.LETTERS[found["run"]]
        foretold, seen = found["foretold"]["value"], found["own"][-1]["value"]
        assert f"{foretold:.2f} and {seen:.2f} for {letter}" in text
    sd = results["residual"]
    said = f"{100 * sd['sd']:.1f} points by itself ({100 * sd['low']:.1f} to {100 * sd['high']:.1f}"
    assert said in text and f"{100 * results['detectable']['value']:.1f} points with 80 %" in text


def test_the_readme_says_what_the_look_found():
    results = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    readme = " ".join((DOCS.parents[1] / "README.md").read_text(encoding="utf-8").split())
    primary, rank, speed = results["contrasts"]

    def between(found):
        return f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"

    assert primary["verdict"] == rank["verdict"] == speed["verdict"] == "open"
    level = f"{100 * primary['confidence']:.2f} %"
    looks = [look["blocks"] for look in results["design"]["looks"]]
    blocks = len(primary["per_seed"])
    look = ("first", "second", "last")[looks.index(blocks)]
    assert f"{100 * primary['difference']:+.1f} points ({between(primary)} at the {look}" in readme
    assert f"look's {level}, p = {primary['p']:.2g}, {primary['df']:.0f} df; {blocks} bl" in readme
    for effect in (rank, speed):
        assert f"is {100 * effect['difference']:+.1f} ({between(effect)})" in readme
    spread = {found["run"]: found for found in results["spread"]}
    seen = {run: f"{found['own'][-1]['value']:.2f}" for run, found in spread.items()}
    foretold = {run: f"{found['foretold']['value']:.2f}" for run, found in spread.items()}
    uniform = f"{spread['proportional']['uniform'][-1]['value']:.2f}"
    assert f"from {uniform} to {seen['proportional']}" in readme
    assert f"algebra alone makes {foretold['proportional']} of" in readme
    assert f"make {seen['speeds_only']} ({foretold['speeds_only']})" in readme
    assert f"speeds {seen['ranks_only']} ({foretold['ranks_only']})" in readme

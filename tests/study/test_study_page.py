"""The study's page says what its records do."""

import json
from pathlib import Path

from scripts import pilot_table, study_table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "study_qwen"


def test_the_page_has_the_tables_of_the_pilot():
    record = json.loads((DOCS / "pilot.json").read_text(encoding="utf-8"))
    assert pilot_table.tables(record) in (DOCS / "README.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_and_verdicts_of_the_look():
    results, ranks, landscape = study_table.read(DOCS)
    page = (DOCS / "README.md").read_text(encoding="utf-8")
    assert study_table.tables(results) in page and study_table.ranks_table(ranks) in page
    assert study_table.landscape_table(landscape) in page
    assert study_table.claims(results, landscape) in page
    assert study_table.rounds_table(DOCS) in page
    assert f"`{results['design']['sha256'][:8]}...`" in page
    text = " ".join(page.split())
    for found in results["spread"]:
        letter = study_table.LETTERS[found["run"]]
        foretold, seen = found["foretold"]["value"], found["own"][-1]["value"]
        assert f"{foretold:.2f} and {seen:.2f} for {letter}" in text
    raw, weight = (slope_of(results, view) for view in ("l2", "weight"))
    assert f"to the power {raw[0]} ({raw[1]} to {raw[2]} by the random" in text
    assert f"with {weight[0]} ({weight[1]} to {weight[2]}), in the last" in text
    thirds = (part["slope"] for part in amplification(results, "l2")["parts"][1:4])
    assert f"({', '.join(f'{slope:.3f}' for slope in thirds)})" in text
    trend, base = ranks["rank_trend"], ranks["base"]["accuracy"]
    said = f"by {100 * trend['slope']:+.1f} points ({between(trend)}, p = {trend['p']:.2g}, 3 seeds"
    assert said in text and f"The base model has {100 * base:.1f} % here" in text
    sd = results["residual"]
    said = f"{100 * sd['sd']:.1f} points by itself ({100 * sd['low']:.1f} to {100 * sd['high']:.1f}"
    assert said in text and f"{100 * results['detectable']['value']:.1f} points with 80 %" in text


def between(found):
    return f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"


def amplification(results, view):
    (found,) = (one for one in results["amplification"] if one["view"] == view)
    return found


def slope_of(results, view):
    return [f"{amplification(results, view)[key]:.3f}" for key in ("slope", "low", "high")]


def test_the_readme_says_what_the_look_found():
    results, ranks, landscape = study_table.read(DOCS)
    readme = " ".join((DOCS.parents[1] / "README.md").read_text(encoding="utf-8").split())
    primary, rank, speed = results["contrasts"]

    assert [one["verdict"] for one in (primary, rank, speed)] == ["equivalent"] * 2 + ["open"]
    within = f"within {100 * primary['margin']:g} points (two one-sided tests, "
    assert f"{within}p = {primary['p_equivalent']:.2g})" in readme
    assert f"equivalent within {100 * rank['margin']:g}; of where" in readme
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
    value, low, high = slope_of(results, "weight")
    drawn = study_table.drawn(results)
    assert f"to the power {value} ({low} to {high}; {drawn}, 80 steps)" in readme
    one = ranks["contrasts"][0]
    assert one["name"] == "uniform, rank 1 - uniform, rank 16" and one["verdict"] == "open"
    said = f"costs {100 * one['difference']:+.1f} points ({between(one)}, p = {one['p']:.2g}, 3"
    assert said in readme
    flat = (p["views"]["l2"]["max_min"] for p in landscape["profiles"])
    ratios = (f"{x['value']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for x in flat)
    assert " and ".join(ratios) in readme
    weights = [p["views"]["weight"]["max_min"]["value"] for p in landscape["profiles"]]
    assert f"frozen weights' gradient {weights[0]:.2f} and {weights[1]:.2f})" in readme
    assert f"from {uniform} to {seen['proportional']}" in readme
    assert f"algebra alone makes {foretold['proportional']} of" in readme
    assert f"make {seen['speeds_only']} ({foretold['speeds_only']})" in readme
    assert f"speeds {seen['ranks_only']} ({foretold['ranks_only']})" in readme

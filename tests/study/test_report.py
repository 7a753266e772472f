"""The report: true to its results, complete, harmless, readable on a phone and on a desktop."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.config_files import decode_config
from jaxgrpo.study.config import StudyConfig
from jaxgrpo.study.design import CELLS
from jaxgrpo.study.importance import importance
from jaxgrpo.study.report import facts, write_report
from jaxgrpo.study.report.interval_charts import accuracy_chart
from jaxgrpo.study.report.panel_charts import cut_chart, heat_maps, reward_chart, share_chart
from jaxgrpo.study.results import collect_results
from jaxgrpo.study.slopes import MECHANICAL_SLOPES
from jaxgrpo.study.verdict import convergence
from tests.study.browser import Browser, find_browser

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIGURES = {
    "accuracy",
    "differences",
    "cuts",
    "slopes",
    "phases",
    "heat-maps",
    "shares",
    "allocations",
    "reward",
    "drift",
}
PLANS = ("uniform", "proportional", "inverse", "random", "reduced", "top_k", "fim", "adaptive")
HOSTILE = '</script><script>alert("1")</script>\'"&|`\\$x^{'
VERDICTS = ("worse", "open", "equivalent", "better")


def make_curve(rng, steps, start, end, noise):
    mean = start + (end - start) * (1 - np.exp(-np.arange(steps) / (steps / 4)))
    mean = mean + rng.normal(0, noise, steps)
    ends = {"low": (mean - 2 * noise).tolist(), "high": (mean + 2 * noise).tolist()}
    return {"steps": list(range(1, steps + 1)), "mean": mean.tolist()} | ends


def ranged(value):
    return {"value": value, "low": value and value - 0.2, "high": value and value + 0.3}


def make_contrast(name, arm, per_seed, verdict="open", family="second"):
    difference = float(np.mean(per_seed))
    fixed = {"p": 0.0041, "low": difference - 0.01, "high": difference + 0.01}
    found = {"name": name, "arm": arm, "family": family, "difference": difference, "df": 6.0}
    found |= {"confidence": 0.95 if family == "primary" else 0.9833, "standard_error": 0.01}
    found |= {"low": difference - 0.025, "high": difference + 0.025, "p": 0.03, "p_holm": 0.2104}
    found |= {"margin": 0.02, "verdict": verdict, "detectable": 0.031}
    found |= {"p_equivalent": 0.071, "equivalent_at": 0.05}
    return found | {"per_seed": per_seed, "fixed_models": fixed}


def measured(arm, rng, layers, steps):
    """An arm as `collect_results` gives it before its first run, with numbers."""
    wave = 10 * np.sin(np.arange(layers) / layers * 6)
    shape = {"uniform": 0 * wave, "proportional": wave, "inverse": -wave}
    ranks = np.rint(32 + shape.get(arm["plan"], rng.normal(0, 8, layers))).tolist()
    seeds = len(arm["seeds"])
    per_seed = (0.66 + rng.normal(0, 0.01, seeds)).tolist()
    accuracy = float(np.mean(per_seed))
    measure = {"per_seed": per_seed, "clipped_ratio": [0.031] * seeds, "mean_length": [141.5]}
    kinds = [(d, a) for d in ("greedy", "sampled") for a in ("reward", "strict", "flexible")]
    numbers = {"accuracy": accuracy, "low": accuracy - 0.022, "high": accuracy + 0.022}
    numbers |= {"per_seed": per_seed, "n_items": 1319, "speed": 1.57}
    numbers |= {"measures": [{"decoding": d, "answer": a} | measure for d, a in kinds]}
    numbers |= {"reward_last_quarter": (0.77 + rng.normal(0, 0.01, seeds)).tolist()}
    numbers |= {"reward_difference": {"value": 0.012, "low": -0.0034, "high": 0.0274}}
    numbers |= {"kl_last_quarter": [0.0123] * seeds, "gradient_clipped": [0.25] * seeds}
    numbers |= {"trainable_parameters": 36_929_536, "total_rank": int(7 * sum(ranks))}
    numbers |= {"rank_min": int(min(ranks)), "rank_max": int(max(ranks)), "layer_ranks": ranks}
    numbers |= {"seconds": 5421.7, "tokens": 81_234_567, "tokens_per_s": 14983.2}
    numbers |= {"reward": make_curve(rng, steps, 0.3, 0.8, 0.02)}
    numbers |= {"drift": make_curve(rng, steps, 4e-7, 6e-7, 4e-8)}
    assert set(numbers) < set(arm)
    return arm | numbers


def make_profile(rng, objective, layers, steps):
    heat = {"grpo": 0.25, "sft": 0.9}[objective] * np.sin(np.arange(layers) / layers * 7)
    views = {}
    for view in ("l2", "weight", "rank_free", "rms"):
        norms = np.exp(heat + rng.normal(0, 0.15, (steps, layers)))
        views[view] = importance(norms, resamples=60).to_json(norms.T)
    kind = {"objective": objective, "steps": steps, "layers": layers}
    return kind | {"modules": list(MODULES), "views": views}


def make_probe(rng, rule, view):
    predicted = MECHANICAL_SLOPES[rule] if view == "l2" else 0.0
    slope = predicted + rng.normal(0, 0.03)
    ends = {"slope": slope, "low": slope - 0.06, "high": slope + 0.06}
    cr1 = {"cr1_low": slope - 0.05, "cr1_high": slope + 0.05, "verdict": "does not"}
    matrices = {"l2": ("both", "A", "B"), "weight": ("W",)}.get(view, ())
    phases = ("all", "first third", "middle third", "last third")
    kinds = [(p, "all", m) for p in phases for m in matrices]
    kinds += [("all", "by layer", m) for m in matrices]
    parts = [{"phase": p, "draws": d, "matrix": m} | ends | cr1 for p, d, m in kinds]
    found = {"scale_rule": rule, "view": view, "predicted": predicted, "margin": 0.1}
    words = f"{slope:+.2f}; {predicted:+.1f} is predicted"
    return found | ends | {"parts": parts, "words": words}


def make_cuts(arm):
    """Four cuts of the uniform arm, the deeper the worse."""
    amounts = [("energy", 0.9), ("energy", 0.95), ("energy", 0.99), ("parameters", 0.25)]
    cuts = []
    for criterion, share in amounts:
        difference = (np.array([-0.03, -0.011, -0.02]) * 10 * (1 - share)).tolist()
        found = {"name": f"uniform, {share:g} of its {criterion}", "arm": "uniform"}
        found |= {"criterion": criterion, "share": share, "difference": difference}
        found |= {"accuracy": np.add(arm["per_seed"], difference).tolist()}
        cuts.append(found | {"parameters": [9_232_384, 9_100_000, 9_012_345]})
    return cuts


def make_results(plans=PLANS[:4], rules=("constant",), layers=28, steps=60, profile_steps=30):
    """Everything measured; what a study is called and set to comes from `collect_results`."""
    rng = np.random.default_rng(0)
    arms = {"plans": list(plans), "scale_rules": list(rules), "seeds": [0, 1, 2]}
    results = unmeasured(arms)
    arms = [measured(arm, rng, layers, steps) for arm in results["arms"]]
    for place, arm in enumerate(arms[1:]):
        gaps = np.subtract(arm["per_seed"], arms[0]["per_seed"]).tolist()
        family = "second" if place else "primary"
        said = VERDICTS[place % 4]
        arm["versus"] = make_contrast(f"{arm['name']} - uniform", "uniform", gaps, said, family)
    probed = [(rule, view) for view in ("l2", "rank_free", "weight") for rule in MECHANICAL_SLOPES]
    note = {"adaptive": "as it ended"}
    numbers = {
        "verdict": ["Open: no plan is shown to be better.", "A run moves by an sd of 0.9 points."],
        "versions": {"jaxgrpo": "0.1.0", "jax": "0.10.2", "device": "cpu x1"},
        "base": {"accuracy": 0.612, "low": 0.585, "high": 0.638, "n": 1319},
        "arms": arms,
        "convergence": convergence(arms),
        "cuts": make_cuts(arms[0]),
        "contrasts": [arm["versus"] for arm in arms if arm["versus"]],
        "residual": {"sd": 0.0093, "df": 6, "low": 0.006, "high": 0.0205},
        "detectable": {"value": 0.0263, "low": 0.017, "high": 0.058},
        "profiles": [make_profile(rng, name, layers, profile_steps) for name in ("grpo", "sft")],
        "amplification": [make_probe(rng, rule, view) for rule, view in probed],
        "amplification_verdict": ["Rank draws no gradient. Slope: +0.49 [+0.43, +0.55]."],
        "spread": [
            {"run": "proportional", "seeds": 3, "foretold": ranged(3.8)}
            | {"uniform": [*map(ranged, (2.7, 3.5, 4.3, 3.4))]}
            | {"own": [*map(ranged, (3.1, 4.0, None, 3.9))]}
        ],
        "landscape": [
            {"run": run, "objective": objective, "seeds": 3, "steps": steps, "top_layers": 8}
            | {"max_min": [*map(ranged, (2.1, 2.4, None, 2.2))]}
            | {"top_share": ranged(0.36), "early_late": ranged(alike)}
            for run, objective, alike in (
                ("uniform-r32", "grpo", 0.962),
                ("uniform-r32-sft", "sft", None),
            )
        ],
        "allocations": [
            {"plan": arm["name"], "layer_ranks": arm["layer_ranks"]}
            | {"note": note.get(arm["plan"], "")}
            for arm in arms
        ],
    }
    assert set(numbers) < set(results)
    return results | numbers


def make_factorial():
    """Three blocks of a seed and a learning rate each; the effects have a margin of their own."""
    made = make_results(plans=PLANS[:4], layers=8)
    for arm, cell in zip(made["arms"], CELLS, strict=True):
        arm |= {"name": cell, "plan": cell, "seeds": [1, 2, 3], "versus": None}
        arm |= {"learning_rates": [5e-4, 1e-3, 2e-3]}
    gaps = [0.01, -0.02, 0.005]
    contrasts = [
        make_contrast("proportional - uniform", "uniform", gaps, "worse", "primary"),
        make_contrast("rank effect", "the other two cells", gaps) | {"margin": 0.015},
        make_contrast("speed effect", "the other two cells", gaps, "equivalent"),
    ]
    bounds = [(3, 0.0014, False), (5, 0.0128, None)]
    design = {
        "sha256": "9f2c" * 16,
        "looks": [
            {"blocks": blocks, "finished": 3, "differs_at": p, "equivalent_at": p, "decided": said}
            for blocks, p, said in bounds
        ],
        "look": 3,
        "cells": CELLS,
        "interactions": [
            {"name": "rank effect", "slope": 0.0123, "low": -0.03, "high": 0.054}
            | {"p": 0.31, "df": 18.0}
        ],
    }
    nothing = ("profiles", "amplification", "amplification_verdict", "spread", "allocations")
    nothing = (*nothing, "landscape")
    made |= {name: [] for name in (*nothing, "cuts")}
    return made | {"contrasts": contrasts, "design": design}


def unmeasured(arms=None):
    """A study before its first run."""
    with tempfile.TemporaryDirectory() as root:
        raw = {"run_dir": root, "lora": {"rank": 32}, "study": {"arms": arms or {}}}
        return collect_results(decode_config(raw, StudyConfig))


def partly_measured():
    """The uniform arm and one profile are done, the others not."""
    results = make_results()
    blank = unmeasured()
    kept = {"profiles": results["profiles"][:1], "base": results["base"]}
    kept |= {"allocations": results["allocations"][:1]}
    return blank | kept | {"arms": [results["arms"][0], *blank["arms"][1:]]}


MAKE = {
    "plans": make_results,
    "factorial": make_factorial,
    "unmeasured": unmeasured,
    "partly": partly_measured,
    "big": lambda: make_results(PLANS, [*MECHANICAL_SLOPES], steps=1000, profile_steps=1000),
}


@dataclass(frozen=True)
class Report:
    results: dict
    folder: Path
    html: str
    markdown: str

    @property
    def tree(self):
        return ElementTree.fromstring(self.html.replace("<!DOCTYPE html>", "", 1))

    @property
    def words(self):
        """What a reader sees, without style sheets and titles."""
        return " ".join(" ".join(self.tree.find("body").itertext()).split())

    @property
    def figures(self):
        return {figure.get("id"): figure for figure in self.tree.iter("figure")}


def render(results, folder):
    write_report(results, folder)
    html, markdown = (folder / f"report.{kind}" for kind in ("html", "md"))
    return Report(results, folder, html.read_text("utf-8"), markdown.read_text("utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Drawing takes seconds, so every kind is drawn once."""
    return functools.cache(lambda kind: render(MAKE[kind](), tmp_path_factory.mktemp(kind)))


def plain(markdown):
    return markdown.replace("\\", "")


def missing(report, wanted):
    """What of it either file lacks."""
    page, text = report.words, plain(report.markdown)
    return [shown for shown in wanted if shown not in page or shown not in text]


# ---- content


def test_the_question_and_the_verdict_come_first(report):
    found = report("plans")
    question, verdict = found.results["question"], found.results["verdict"][0]
    assert found.words.startswith(f"{question} Accuracy {verdict}")
    assert found.markdown.startswith(f"# {question}\n\n**{verdict}**")


def test_every_arm_is_called_better_worse_equivalent_or_open_at_once(report):
    """Before the first section, with its difference and interval."""
    found = report("plans")
    head = found.words[: found.words.index("Held-out accuracy per arm")]
    for one in found.results["contrasts"]:
        said = f"{one['name']} {one['verdict']} {facts.points(one['difference'])} points"
        assert f"{said} ({facts.span(one['low'], one['high'], facts.points)})" in head


@pytest.mark.parametrize("kind", ["plans", "big"])
def test_every_figure_is_drawn_wide_and_narrow_and_described(kind, report):
    figures = report(kind).figures
    assert set(figures) == FIGURES
    for name, figure in figures.items():
        charts = list(figure.iter("svg"))
        assert len(charts) == 2, name
        assert all(len(chart.get("aria-label")) > 20 for chart in charts)
        assert figure.find("h3").text and figure.find("figcaption").text.endswith(".")


def test_both_files_say_what_a_reader_needs_to_judge_a_difference(report):
    found = report("plans")
    wanted = ["61.2 %", "36,929,536", "0.9 points, 6 df", "2.6 points", "±2 points", "primary"]
    wanted += ["0.210", "0.030", "0.004", "98.33 %", "3.1 %", "25.0 %", "0.0123", "1.57", "142"]
    wanted += ["greedy, strict", "sampled, flexible", "14,983", "Not told apart is not equal"]
    wanted += ["Training has not converged"]
    for arm in found.results["arms"]:
        wanted += [arm["name"], f"{100 * arm['accuracy']:.1f} %"]
        wanted += [f"{100 * value:.1f}" for value in arm["per_seed"]]
    for one in found.results["contrasts"]:
        wanted += [facts.points(value) for value in (one["difference"], *one["per_seed"])]
    assert not missing(found, wanted)


def test_both_files_hold_profiles_slopes_paper_settings_and_versions(report):
    found = report("plans")
    wanted = [entry["words"] for entry in found.results["amplification"]]
    wanted += [
        "first third",
        "all, one rank per layer",
        "the frozen weight",
        "does not",
        "3.10 (2.70)",
        "– (4.30)",
    ]
    for profile in found.results["profiles"]:
        for view in profile["views"].values():
            wanted += [f"{view['max_min']['value']:.2f}", f"{view['early_late_correlation']:.3f}"]
    wanted += [row[key] for row in found.results["paper"] for key in ("quantity", "paper", "ours")]
    wanted += [*found.results["settings"].values(), *found.results["versions"].values()]
    assert not missing(found, wanted)


def test_a_factorial_shows_its_design(report):
    found = report("factorial")
    design = found.results["design"]
    wanted = [design["sha256"][:16], "proportional - uniform", "rank effect", "speed effect"]
    wanted += [*CELLS, *CELLS.values(), "p ≤ 0.0014", "p ≤ 0.0128", "not all runs are there"]
    wanted += ["block 1, rate 0.0005", "block 3, rate 0.002", "look at 3 blocks", "±2", "±1.5"]
    wanted += ["+1.2", "−3.0 to +5.4", "0.310"]
    assert not missing(found, wanted)
    assert set(found.figures) == {"accuracy", "differences", "reward", "drift"}
    assert "The factorial design" not in report("plans").words


def test_cuts_are_drawn_and_listed_beside_the_uncut_adapter(report):
    """Accuracy by what is kept; the uncut adapter at 100 %."""
    found = report("plans")
    wanted = ["Cut after training", "uniform, 0.9 of its energy", "9,114,910", "PARA"]
    for cut in found.results["cuts"]:
        wanted += [facts.percent(float(np.mean(cut["accuracy"])))]
        wanted += [", ".join(map(facts.points, cut["difference"]))]
    assert not missing(found, wanted)
    for axes, kept in zip(cut_chart(found.results, False).axes, ([90, 95, 99], [25]), strict=True):
        line = axes.lines[0]
        np.testing.assert_allclose(line.get_xdata(), [*kept, 100])
        uncut = found.results["arms"][0]["accuracy"]
        assert line.get_ydata()[-1] == pytest.approx(100 * uncut)
    assert "Cut after training" not in report("factorial").words


@pytest.mark.parametrize(
    ("rise", "said"), [(0.5, "has not converged"), (0.0, "is seen to rise at the end")]
)
def test_convergence_is_judged_by_the_last_half_of_the_rewards(rise, said):
    results = make_results(layers=2)
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    for arm in results["arms"]:
        arm["reward"]["mean"] = (0.5 + rise * np.arange(40) / 40 + noise).tolist()
    assert said in convergence(results["arms"])


# ---- what is drawn


@pytest.mark.parametrize("narrow", [False, True])
def test_accuracies_and_seeds_are_drawn_where_they_belong(narrow):
    results = make_results(layers=2)
    drawn = [line.get_xdata() for line in accuracy_chart(results, narrow).axes[0].lines]
    for arm in results["arms"]:
        for wanted in ([arm["accuracy"]], [arm["low"], arm["high"]], arm["per_seed"]):
            assert any(
                len(x) == len(wanted) and np.allclose(x, 100 * np.array(wanted)) for x in drawn
            )


def test_curves_are_those_of_the_arms_with_uniform_behind():
    results = make_results(layers=2)
    for axes, arm in zip(reward_chart(results, False).axes, results["arms"], strict=False):
        *behind, own = (line.get_ydata() for line in axes.lines)
        np.testing.assert_allclose(own, arm["reward"]["mean"])
        if arm["plan"] != "uniform":
            np.testing.assert_allclose(behind, [results["arms"][0]["reward"]["mean"]])


def test_an_arm_whose_uniform_has_not_run_is_drawn_alone():
    results = make_results(layers=2)
    results["arms"][0] = unmeasured()["arms"][0]
    assert [len(axes.lines) for axes in reward_chart(results, True).axes[:3]] == [1, 1, 1]


def test_no_share_lies_outside_its_panel():
    results = make_results(layers=8)
    results["profiles"][1]["views"]["rms"] |= {"share": [0.9] + 7 * [0.0143]}
    for axes in share_chart(results, False).axes:
        shown = np.concatenate([line.get_ydata() for line in axes.lines])
        assert axes.get_ylim()[0] == 0 and shown.max() <= axes.get_ylim()[1]


def test_heat_maps_show_a_layer_over_the_mean_of_its_step():
    """One layer three times the others, and a step without gradient."""
    results = make_results(layers=28)
    norms = np.ones((28, 30))
    norms[5] = 3.0
    norms[:, 7] = 0.0
    for profile in results["profiles"]:
        for found in profile["views"].values():
            found["heatmap"] = norms.tolist()
    shown = np.ma.filled(heat_maps(results, False).axes[0].images[0].get_array(), np.nan)
    wanted = norms / (30 / 28)
    wanted[:, 7] = np.nan
    np.testing.assert_allclose(shown, wanted)


def test_drawings_take_every_colour_from_the_style_sheet(report):
    """And the style sheet has each for light and for dark; only heat maps bring their own."""
    drawings = "".join(re.findall(r"<svg.*?</svg>", report("plans").html, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'href="data:[^"]*"', "", drawings))
    used = set(re.findall(r"var\(--(\w+)\)", drawings))
    style = report("plans").html.partition("</style>")[0]
    assert used and all(style.count(f"--{name}:") == 2 for name in used)


# ---- what is missing


@pytest.mark.parametrize("kind", ["unmeasured", "partly", "factorial"])
def test_no_heading_stands_above_nothing(kind, report):
    tags = [node.tag for node in report(kind).tree.find("body/main")]
    assert ("h2", "h2") not in pairwise(tags) and tags[-2] != "h2"


@pytest.mark.parametrize("kind", ["unmeasured", "partly"])
def test_an_unfinished_study_leaves_out_what_is_not_measured(kind, report):
    found = report(kind)
    assert not missing(found, [found.results["verdict"][0], "not measured"])
    assert not re.search(r"\b(None|nan|inf)\b", found.words + found.markdown)
    drawn = set() if kind == "unmeasured" else {"accuracy", "heat-maps", "shares", "allocations"}
    assert set(found.figures) == drawn | ({"reward", "drift"} if drawn else drawn)
    assert "Differences" not in found.words


def test_what_is_not_finite_is_not_drawn(tmp_path):
    """In memory an idle layer leaves nan and infinity, in results.json null."""
    broken = make_results(layers=4) | {"amplification": []}
    del broken["profiles"][1:]
    for profile in broken["profiles"]:
        for found in profile["views"].values():
            found["max_min"] |= {"value": None, "high": None}
            found["early_late_correlation"] = None
            found["heatmap"][0] = [0.0] * len(found["heatmap"][0])
            found["high"][2] = float("inf")
    for arm in broken["arms"]:
        arm["reward"]["mean"][4] = arm["drift"]["mean"][4] = float("nan")
        arm["reward"]["low"][4] = None
    for one in broken["contrasts"]:
        one |= dict.fromkeys(("low", "high", "p", "p_holm", "df", "detectable"))
        one |= dict.fromkeys(("p_equivalent", "equivalent_at"))
    found = render(broken | {"residual": None}, tmp_path)
    assert not re.search(r"\b(None|nan|inf)\b", found.words + found.markdown)
    assert not missing(found, ["infinite", "not defined", "One seed"])


def test_results_read_back_from_json_give_the_same_report(report, tmp_path):
    found = report("factorial")
    assert render(json.loads(json.dumps(found.results)), tmp_path).html == found.html


def test_a_study_of_one_layer_and_one_arm_is_drawn(tmp_path):
    tiny = make_results(plans=("uniform",), layers=2, steps=1, profile_steps=4)
    tiny["arms"][0] |= {"per_seed": [0.5], "accuracy": 0.5, "low": 0.5, "high": 0.5}
    tiny["arms"][0] |= {"seeds": [0], "learning_rates": [1e-3]}
    tiny |= {"profiles": tiny["profiles"][:1], "amplification": []}
    render(tiny | {"base": None, "residual": None, "detectable": None}, tmp_path)


# ---- harmless


def poisoned(value):
    """Every string, keys of settings and versions included, made hostile."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    return value


@pytest.mark.filterwarnings("ignore:constrained_layout")  # such names leave no room for axes
def test_names_from_configurations_cannot_become_markup(tmp_path):
    hostile = poisoned(make_results(layers=4)) | {"settings": {HOSTILE: HOSTILE}}
    found = render(hostile, tmp_path)
    assert not list(found.tree.iter("script")) and "<script" not in found.html
    assert HOSTILE in "".join(found.tree.find("body").itertext())
    attributes = [name for node in found.tree.iter() for name in node.attrib]
    assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"(?<!\\)[<>`]", found.markdown)
    # Every row of a table has as many cells as its head.
    for block in re.split(r"\n(?!\|)", found.markdown):
        rows = [row for row in block.splitlines() if row.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


def test_the_page_refers_to_nothing_outside_and_its_own_references_hold(report):
    found = report("big")
    assert not re.search(r"https?://|<script|@import", found.html)
    ids = [node.get("id") for node in found.tree.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    links = [node.get(name) for node in found.tree.iter() for name in ("src", "href")]
    inside = {link for link in links if link and not link.startswith("data:")}
    inside |= set(re.findall(r"url\(([^)]*)\)", found.html))
    assert all(link[0] == "#" and link[1:] in ids for link in inside)


def test_a_big_study_stays_a_small_file(report):
    found = report("big")
    assert len(found.results["arms"]) >= 22
    assert len(found.html.encode()) < 1.5 * 2**20 and len(found.markdown.encode()) < 100_000


def test_the_report_needs_no_jax_and_its_templates_are_shipped():
    code = "import sys, jaxgrpo.study.report; assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    root = Path(write_report.__code__.co_filename).parents[2]
    settings = tomllib.loads((root.parent / "pyproject.toml").read_text("utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["jaxgrpo"]
    shipped = {path for pattern in patterns for path in root.glob(pattern)}
    beside = {path for path in (root / "study/report").iterdir() if path.is_file()}
    assert {path for path in beside if path.suffix != ".py"} <= shipped


# ---- in a browser

MEASURE = """(() => {
  const box = (node) => node ? node.getBoundingClientRect() : {width: 0, height: 0};
  const shown = (figure) => [...figure.querySelectorAll('svg[role=img]')]
    .map(box).filter((b) => b.width > 100 && b.height > 40).length;
  const outside = [];
  const overlaps = [];
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const frame = box(svg);
    if (!frame.width) continue;
    for (const text of svg.querySelectorAll('text')) {
      const b = box(text);
      if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1
          || b.top < frame.top - 1) outside.push(text.textContent);
    }
    const texts = [...svg.querySelectorAll('text')].filter((t) => t.textContent);
    const boxes = texts.map(box);
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [boxes[i], boxes[j]];
      // A line's box is taller than its letters.
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
        overlaps.push(texts[j].textContent + ' / ' + texts[i].textContent);
    }
  }
  // As shown, in CSS pixels: a drawing is scaled to the page.
  const sizes = [...document.querySelectorAll('svg text')].filter((t) => box(t).width).map((t) =>
    parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b));
  const verdict = document.getElementById('verdict');
  const size = (node) => parseFloat(getComputedStyle(node).fontSize);
  return {
    page: document.documentElement.scrollWidth,
    window: window.innerWidth,
    figures: Object.fromEntries([...document.querySelectorAll('figure')]
      .map((figure) => [figure.id, shown(figure)])),
    outside,
    overlaps,
    smallest: Math.min(99, ...sizes),
    verdict: box(verdict).height > 10 && box(verdict).bottom < 900,
    verdict_size: size(verdict),
    ground: getComputedStyle(document.body).backgroundColor,
  };
})()"""


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here")
    with Browser(program) as found:
        yield found


@pytest.mark.parametrize("kind", ["plans", "factorial", "big", "partly", "unmeasured"])
def test_a_browser_shows_it_at_every_width_and_in_both_themes(kind, report, browser):
    found = report(kind)
    url = (found.folder / "report.html").as_uri()
    grounds = set()
    for width, scheme in ((390, "light"), (390, "dark"), (800, "light"), (1280, "dark")):
        browser.open(url, width, scheme=scheme)
        seen = browser.evaluate(MEASURE)
        assert seen["page"] <= seen["window"] == width
        assert seen["figures"] == dict.fromkeys(found.figures, 1)
        assert not seen["outside"] and not seen["overlaps"]
        assert seen["verdict"] and seen["verdict_size"] >= 21 and seen["smallest"] >= 10
        grounds.add(seen["ground"])
        check_quiet(browser.events, url)
    assert len(grounds) == 2


def check_quiet(events, url):
    """No error, no exception, and no request but the one for the file."""
    methods = [event["method"] for event in events]
    assert "Runtime.exceptionThrown" not in methods
    assert not [e for e in events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    requests = [e for e in events if e["method"] == "Network.requestWillBeSent"]
    addresses = [event["params"]["request"]["url"] for event in requests]
    assert {address for address in addresses if not address.startswith("data:")} == {url}

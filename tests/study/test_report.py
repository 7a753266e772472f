"""The report: true to its results, complete, harmless, readable on a phone and on a desktop."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxgrpo.study.importance import importance
from jaxgrpo.study.report import facts, write_report
from jaxgrpo.study.report.plot import index_ticks, log_ticks, nice_ticks
from jaxgrpo.study.slopes import MECHANICAL_SLOPES
from tests.study.browser import Browser, find_browser

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIGURES = (
    "accuracy",
    "differences",
    "slopes",
    "amplification",
    "heat-maps",
    "shares",
    "allocations",
    "importance-rank",
    "reward",
    "drift",
)
PLANS = ("uniform", "proportional", "inverse", "random", "reduced", "top_k", "fim", "adaptive")
RULES = ("constant", "rslora", "alpha_over_r")
HOSTILE = '</script><script>alert("1")</script>\'"&|`\\'


def make_ranks(plan, layers, mean_rank=32):
    rng = np.random.default_rng(sum(map(ord, plan)))
    wave = 10 * np.sin(np.arange(layers) / layers * 6)
    shape = {
        "uniform": 0 * wave,
        "proportional": wave,
        "inverse": -wave,
        "top_k": np.where(np.arange(layers) < layers // 2, 30, -30),
    }.get(plan, rng.normal(0, 8, layers))
    ranks = np.clip(np.rint(mean_rank + shape), 1, 64)
    return (0.7 * ranks if plan == "reduced" else ranks).tolist()


def make_curve(rng, steps, start, end, noise, spread=False):
    mean = start + (end - start) * (1 - np.exp(-np.arange(steps) / (steps / 4)))
    mean = mean + rng.normal(0, noise, steps)
    curve = {"steps": list(range(1, steps + 1)), "mean": mean.tolist()}
    if spread:
        curve |= {"low": (mean - 2 * noise).tolist(), "high": (mean + 2 * noise).tolist()}
    return curve


def make_arm(rng, plan, rule, layers, steps, several_rules):
    accuracy = 0.66 + rng.normal(0, 0.02)
    layer_ranks = make_ranks(plan, layers)
    named = f", {rule}" if several_rules and rule != "any" else ""
    versus = None
    if plan != "uniform":
        difference = rng.normal(-0.01, 0.015)
        versus = {
            "arm": "uniform",
            "difference": difference,
            "low": difference - 0.025,
            "high": difference + 0.025,
            "p": 0.03,
            "only_this": 30,
            "only_other": 40,
            "p_holm": 0.2104,
        }
    return {
        "name": plan + named,
        "plan": plan,
        "scale_rule": rule,
        "mean_rank": 32,
        "seeds": [0, 1, 2],
        "accuracy": accuracy,
        "low": accuracy - 0.022,
        "high": accuracy + 0.022,
        "per_seed": [accuracy - 0.011, accuracy + 0.002, accuracy + 0.009],
        "n_items": 1319,
        "trainable_parameters": 36_929_536,
        "total_rank": int(7 * sum(layer_ranks)),
        "rank_min": int(min(layer_ranks)),
        "rank_max": int(max(layer_ranks)),
        "ranks": {module: list(map(int, layer_ranks)) for module in MODULES},
        "layer_ranks": layer_ranks,
        "reward": make_curve(rng, steps, 0.3, 0.8, 0.02, spread=True),
        "drift": make_curve(rng, steps, 0.004, 0.006, 0.0004),
        "seconds": 5421.7,
        "tokens": 81_234_567,
        "tokens_per_s": 14983.2,
        "versus": versus,
    }


def make_profile(rng, objective, layers, steps):
    heat = {"grpo": 0.25, "sft": 0.9}[objective] * np.sin(np.arange(layers) / layers * 7)
    views = {}
    for view in ("l2", "weight", "rank_free", "rms"):
        norms = np.exp(heat + rng.normal(0, 0.15, (steps, layers)))
        views[view] = importance(norms, resamples=60).to_json(norms.T)
    return {
        "objective": objective,
        "steps": steps,
        "layers": layers,
        "modules": list(MODULES),
        "views": views,
    }


def make_probe(rng, rule, view, layers):
    predicted = MECHANICAL_SLOPES[rule] if view == "l2" else 0.0
    slope = predicted + rng.normal(0, 0.03)
    points = []
    for layer in range(layers):
        for module in MODULES:
            log_rank = float(np.log(rng.integers(8, 65)))
            log_share = slope * (log_rank - 3.4) + rng.normal(0, 0.12)
            points.append(
                {
                    "arm": "random draw 0",
                    "layer": layer,
                    "module": module,
                    "log_rank": log_rank,
                    "log_share": log_share,
                }
            )
    return {
        "scale_rule": rule,
        "view": view,
        "predicted": predicted,
        "slope": slope,
        "low": slope - 0.06,
        "high": slope + 0.06,
        "points": points,
        "words": f"{slope:+.2f}; {predicted:+.1f} is predicted",
    }


def make_results(plans=PLANS[:4], rules=("constant",), layers=28, steps=60, profile_steps=30):
    rng = np.random.default_rng(0)
    kinds = [("uniform", "any"), *((p, r) for p in plans if p != "uniform" for r in rules)]
    arms = [make_arm(rng, plan, rule, layers, steps, len(rules) > 1) for plan, rule in kinds]
    return {
        "title": "Does this rank allocation help under GRPO?",
        "question": (
            "At one budget of 32 ranks per adapter on average: does giving layers different ranks "
            f"({', '.join(plans[1:])}) beat the same rank everywhere, and does a layer's rank draw "
            "gradient to it?"
        ),
        "verdict": [
            "No difference found: no plan is reliably better or worse than uniform ranks.",
            "Not told apart from uniform: proportional is -0.8 points (-3.3 to +1.7, p = 0.21).",
            "A true difference below about 2.6 points would go unseen at this size.",
        ],
        "settings": {
            "model": "Qwen/Qwen2.5-1.5B-Instruct, 1,543,714,304 parameters",
            "data": "openai/gsm8k",
            "steps": "1000 per arm, 50 per profile and probe",
            "budget": "mean rank 32, ranks 20 to 40, counted in ranks, one rank per layer",
            "adapted": ", ".join(MODULES),
        },
        "versions": {"jaxgrpo": "0.1.0", "jax": "0.10.2", "device": "cpu x1"},
        "base": {"accuracy": 0.612, "low": 0.585, "high": 0.638, "n": 1319},
        "arms": arms,
        "minimum_detectable_effect": 0.0263,
        "detectable_note": "smallest true difference that a paired comparison on 1319 items finds",
        "importance": {"objective": "grpo", "view": "l2"},
        "profiles": [make_profile(rng, name, layers, profile_steps) for name in ("grpo", "sft")],
        "amplification": [
            make_probe(rng, rule, view, layers)
            for view in ("l2", "rank_free", "weight")
            for rule in RULES
        ],
        "amplification_verdict": [
            "The layers' raw gradient shares follow rank as the LoRA parameterisation alone "
            "predicts, and rank draws no gradient to a layer beyond that. Slope of ln share over "
            "ln rank: raw L2 +0.49 [+0.43, +0.55] under constant (predicted +0.5).",
            "Every prediction lies inside its interval.",
        ],
        "paper": [
            {
                "quantity": "accuracy, uniform",
                "paper": "74.5% (n = 200, 1 seed)",
                "ours": "66.0%",
                "note": "another model and task: not a replication",
            },
            {
                "quantity": "max/min layer share, proportional run",
                "paper": "3.00",
                "ours": "2.91",
                "note": "2.17 x sqrt(40/20) = 3.07",
            },
        ],
        "allocations": [
            {
                "plan": arm["name"],
                "layer_ranks": arm["layer_ranks"],
                "note": "as it ended" if arm["plan"] == "adaptive" else "",
            }
            for arm in arms
        ],
    }


def unmeasured(results):
    """The same study before its first run."""
    results = copy.deepcopy(results)
    empty = {"accuracy": None, "low": None, "high": None, "per_seed": [], "n_items": 0}
    empty |= {"trainable_parameters": None, "total_rank": None, "rank_min": None, "rank_max": None}
    empty |= {"ranks": {}, "layer_ranks": [], "seconds": None, "tokens": None, "tokens_per_s": None}
    empty |= {"versus": None, "drift": {"steps": [], "mean": []}}
    empty |= {"reward": {"steps": [], "mean": [], "low": [], "high": []}}
    for arm in results["arms"]:
        arm.update(copy.deepcopy(empty))
    return results | {
        "verdict": ["No arm is finished together with its uniform reference yet."],
        "versions": {},
        "base": None,
        "minimum_detectable_effect": None,
        "profiles": [],
        "amplification": [],
        "amplification_verdict": [],
        "allocations": [],
    }


def partly_measured(results):
    """The uniform arm and the profiles are done, the others not."""
    blank = unmeasured(results)
    arms = [results["arms"][0], *blank["arms"][1:]]
    allocations = results["allocations"][:1]
    return blank | {
        "arms": arms,
        "profiles": results["profiles"][:1],
        "base": results["base"],
        "allocations": allocations,
    }


@pytest.fixture(scope="module")
def results():
    return make_results()


@pytest.fixture(scope="module")
def big():
    return make_results(PLANS, RULES, layers=28, steps=1000, profile_steps=1000)


def render(results, folder):
    """(html, its parsed tree, markdown)."""
    write_report(results, folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    tree = ElementTree.fromstring(html.replace("<!DOCTYPE html>", "", 1))
    return html, tree, (folder / "report.md").read_text(encoding="utf-8")


def words(tree):
    """What a reader sees, without style sheets and titles."""
    body = tree.find("body")
    return " ".join(" ".join(body.itertext()).split())


def by_id(tree, name):
    return next(node for node in tree.iter() if node.get("id") == name)


def charts(figure):
    return [node for node in figure.iter("svg") if node.get("role") == "img"]


# ---- content


def test_the_page_begins_with_the_question_and_the_verdict(results, tmp_path):
    _, tree, markdown = render(results, tmp_path)
    assert words(tree).startswith(results["question"])
    assert by_id(tree, "verdict").text == results["verdict"][0]
    assert markdown.startswith(f"# {results['question']}")
    first = [line for line in markdown.splitlines() if line][1]
    assert results["verdict"][0] in first


@pytest.mark.parametrize("kind", ["results", "big"])
def test_every_figure_is_drawn_for_all_widths_and_described(kind, request, tmp_path):
    _, tree, _ = render(request.getfixturevalue(kind), tmp_path)
    for name in FIGURES:
        figure = by_id(tree, name)
        assert len(charts(figure)) == 3, name
        assert all(len(chart.get("aria-label")) > 20 for chart in charts(figure))
        assert figure.find("h3") is not None
        assert "".join(figure.find("figcaption").itertext()).strip().endswith(".")


def test_both_files_hold_every_number_of_the_accuracy_table(results, tmp_path):
    _, tree, markdown = render(results, tmp_path)
    page = words(tree)
    for arm in results["arms"]:
        for shown in (arm["name"], f"{100 * arm['accuracy']:.1f} %", "36,929,536"):
            assert shown in page and shown in markdown
        seeds = ", ".join(f"{100 * value:.1f}" for value in arm["per_seed"])
        assert seeds in page and seeds in markdown
    points = facts.signed(100 * results["arms"][1]["versus"]["difference"], places=1)
    assert points in page and points in markdown
    detectable = f"Minimum detectable effect: 2.6 points ({results['detectable_note']})."
    for shown in ("0.210", "61.2 %", detectable, "81,234,567"):
        assert shown in page and shown in markdown


def test_both_files_hold_profiles_slopes_paper_settings_and_versions(results, tmp_path):
    _, tree, markdown = render(results, tmp_path)
    page = words(tree)
    wanted = [facts.signed(entry["slope"]) for entry in results["amplification"]]
    for profile in results["profiles"]:
        for found in profile["views"].values():
            wanted += [f"{found['max_min']['value']:.2f}", f"{100 * found['share'][0]:.2f}"]
            wanted.append(f"{found['early_late_correlation']:.3f}")
    wanted += [row[key] for row in results["paper"] for key in ("quantity", "paper", "ours")]
    wanted += [*results["settings"].values(), *results["versions"].values()]
    for shown in wanted:
        assert shown in page and shown in markdown, shown
    for sentence in results["amplification_verdict"]:
        for part in sentence.split(". ")[:1]:
            assert part in page and part in markdown.replace("\\", "")


def test_accuracies_are_drawn_where_they_belong(results, tmp_path):
    """Pixels against values: equal distances in accuracy are equal distances on the page."""
    _, tree, _ = render(results, tmp_path)
    chart = charts(by_id(tree, "accuracy"))[0]
    marks = [
        box
        for box in chart.iter()
        if "mark" in box.get("class", "").split() and box.tag == "circle"
    ]
    x = [float(mark.get("cx")) for mark in marks]
    accuracy = [arm["accuracy"] for arm in results["arms"] if arm["scale_rule"] == "constant"]
    slope, offset = np.polyfit(accuracy, x, 1)
    assert slope > 0
    np.testing.assert_allclose(slope * np.array(accuracy) + offset, x, atol=0.1)


@pytest.mark.parametrize(("name", "curve"), [("reward", "reward"), ("drift", "drift")])
def test_curves_use_the_height_of_their_panels(name, curve, results, tmp_path):
    _, tree, _ = render(results, tmp_path)
    chart = charts(by_id(tree, name))[0]
    panel = next(node for node in chart.iter("rect") if node.get("class") == "plot")
    drawn = [n.get("d") for n in chart.iter("path") if n.get("class", "").startswith("curve")]
    assert len(drawn) == len(results["arms"])
    y = [float(pair.split()[1]) for pair in re.split("[ML]", drawn[0]) if pair]
    assert max(y) - min(y) > 0.4 * float(panel.get("height"))
    mean = results["arms"][0][curve]["mean"]
    assert np.corrcoef(mean, y)[0, 1] < -0.999


def test_heat_map_colours_follow_the_norms(results, tmp_path):
    """One hot layer, the others alike: its row alone has the hottest colour."""
    results = copy.deepcopy(results)
    norms = np.ones((28, 30))
    norms[5] = 3.0
    for profile in results["profiles"]:
        for found in profile["views"].values():
            found["heatmap"] = norms.tolist()
    _, tree, _ = render(results, tmp_path)
    heat = next(n for n in charts(by_id(tree, "heat-maps"))[0].iter("svg") if n.get("class"))
    hottest = [path.get("d") for path in heat.iter("path") if path.get("class") == "d10"]
    assert hottest == ["M0 5h30v1h-30z"]


# ---- what is missing


@pytest.mark.parametrize("make", [unmeasured, partly_measured])
def test_an_unfinished_study_gives_a_whole_report(make, results, tmp_path):
    unfinished = make(results)
    _, tree, markdown = render(unfinished, tmp_path)
    page = words(tree)
    assert unfinished["verdict"][0] in page and unfinished["verdict"][0] in markdown
    assert "not measured" in page and "not measured" in markdown
    assert not re.search(r"\b(None|nan|inf)\b", page + markdown)
    for name in FIGURES:
        by_id(tree, name)


def test_what_is_not_finite_is_not_drawn(results, tmp_path):
    """In memory an idle layer leaves nan and infinity, in results.json null."""
    broken = copy.deepcopy(results)
    for profile in broken["profiles"]:
        for found in profile["views"].values():
            found["max_min"] |= {"value": None, "high": None}
            found["early_late_correlation"] = None
            found["heatmap"][0] = [0.0] * len(found["heatmap"][0])
            for row in found["heatmap"]:
                row[3] = 0.0
            found["high"][2] = float("inf")
    for arm in broken["arms"]:
        arm["reward"]["mean"][4] = arm["drift"]["mean"][4] = float("nan")
        arm["reward"]["low"][4] = None
    html, _, markdown = render(broken, tmp_path)
    assert not re.search(r"\b(None|nan|inf)\b", html + markdown)
    assert "infinite" in html and "not defined" in html
    assert "no gradient in that step" in html


def test_results_read_back_from_json_give_the_same_report(results, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    again = json.loads(json.dumps(results))
    assert render(results, tmp_path / "a")[0] == render(again, tmp_path / "b")[0]


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


def test_names_from_configurations_cannot_become_markup(results, tmp_path):
    hostile = poisoned(results)
    for arm, clean in zip(hostile["arms"], results["arms"], strict=True):
        arm["plan"] = clean["plan"]
    for entry, clean in zip(hostile["profiles"], results["profiles"], strict=True):
        entry["objective"] = clean["objective"]
    hostile["settings"] = {HOSTILE: HOSTILE}
    html, tree, markdown = render(hostile, tmp_path)
    assert not list(tree.iter("script")) and "<script" not in html
    assert HOSTILE in "".join(tree.find("body").itertext())
    assert not [name for node in tree.iter() for name in node.attrib if name.startswith("on")]
    assert not re.search(r"(?<!\\)[<>`]", markdown)
    # Every row of a table has as many cells as its head.
    for block in re.split(r"\n(?!\|)", markdown):
        rows = [row for row in block.splitlines() if row.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


def test_the_page_refers_to_nothing_outside(results, tmp_path):
    html, tree, _ = render(results, tmp_path)
    assert not re.search(r"https?://|<script|@import|url\(", html)
    for node in tree.iter():
        for name in ("src", "href"):
            assert node.get(name, "#")[0] == "#" or node.get(name) == "data:,"


def test_ids_are_unique_and_links_lead_somewhere(results, tmp_path):
    _, tree, _ = render(results, tmp_path)
    ids = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    assert {node.get("href")[1:] for node in tree.iter("a")} <= set(ids)


def test_a_big_study_stays_a_small_file(big, tmp_path):
    assert len(big["arms"]) >= 22
    render(big, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 2 * 2**20
    assert (tmp_path / "report.md").stat().st_size < 200_000


def test_a_study_of_one_layer_and_one_arm_is_drawn(tmp_path):
    tiny = make_results(plans=("uniform",), layers=2, steps=1, profile_steps=4)
    tiny["arms"][0]["per_seed"] = [0.5]
    tiny["arms"][0] |= {"accuracy": 0.5, "low": 0.5, "high": 0.5}
    tiny["base"] = None
    render(tiny, tmp_path)


def test_the_report_needs_no_jax():
    code = "import sys, jaxgrpo.study.report; assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- ticks


@pytest.mark.parametrize(
    "values", [[0.61, 0.68], [0, 0], [-3.3, 4.9], [1e-7, 3e-7], [5e6, 9e6], [7, 7], [], [2, None]]
)
def test_ticks_are_few_in_order_and_enclose_the_values(values):
    ticks = nice_ticks(values)
    known = [v for v in values if v is not None]
    assert 2 <= len(ticks.values) <= 9
    assert ticks.low <= ticks.values[0] and ticks.values[-1] <= ticks.high
    assert list(ticks.values) == sorted(set(ticks.values))
    assert len(set(ticks.labels)) == len(ticks.labels)
    for value in known:
        assert ticks.low - 1e-12 <= value <= ticks.high + 1e-12


@pytest.mark.parametrize("ratios", [[8, 64], [0.5, 2.1], [0.97, 1.04], [1e-3, 1e3], [16, 16]])
def test_logarithmic_ticks_are_labelled_with_the_values_themselves(ratios):
    ticks = log_ticks(np.log(ratios))
    assert 1 <= len(ticks.values) <= 6
    np.testing.assert_allclose(np.exp(ticks.values), [float(x) for x in ticks.labels], rtol=0.01)


@pytest.mark.parametrize("ranks", [[4, 12], [1, 2], [1, 64], [16, 16], [1, 4096]])
def test_ticks_of_ranks_are_whole_numbers(ranks):
    ticks = log_ticks(np.log(ranks), whole=True)
    assert 1 <= len(ticks.values) <= 6
    assert all(float(label.replace(",", "")).is_integer() for label in ticks.labels)


@pytest.mark.parametrize("size", [1, 2, 4, 24, 28, 80, 1000])
def test_layer_ticks_are_layers(size):
    ticks = index_ticks(size)
    assert ticks.values[0] == 0 and ticks.values[-1] <= max(size - 1, 0)
    assert len(ticks.values) <= 8


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
  const verdict = document.getElementById('verdict');
  const size = (node) => parseFloat(getComputedStyle(node).fontSize);
  return {
    page: document.documentElement.scrollWidth,
    window: window.innerWidth,
    figures: Object.fromEntries([...document.querySelectorAll('figure')]
      .map((figure) => [figure.id, shown(figure)])),
    outside,
    overlaps,
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


@pytest.mark.parametrize("kind", ["results", "big"])
def test_a_browser_shows_it_at_every_width_and_in_both_themes(kind, request, browser, tmp_path):
    write_report(request.getfixturevalue(kind), tmp_path)
    url = (tmp_path / "report.html").as_uri()
    grounds = set()
    for width in (390, 700, 1280):
        for scheme in ("light", "dark"):
            browser.open(url, width, scheme=scheme)
            seen = browser.evaluate(MEASURE)
            assert seen["page"] <= seen["window"] == width
            assert seen["figures"] == dict.fromkeys(FIGURES, 1)
            assert not seen["outside"] and not seen["overlaps"]
            assert seen["verdict"] and seen["verdict_size"] >= 21
            grounds.add(seen["ground"])
            check_quiet(browser.events, url)
    assert len(grounds) == 2


@pytest.mark.parametrize("make", [unmeasured, partly_measured])
def test_a_browser_shows_an_unfinished_study(make, results, browser, tmp_path):
    write_report(make(results), tmp_path)
    url = (tmp_path / "report.html").as_uri()
    browser.open(url, 390)
    seen = browser.evaluate(MEASURE)
    assert seen["page"] <= seen["window"] and seen["verdict"]
    assert set(seen["figures"]) == set(FIGURES)
    assert not seen["outside"] and not seen["overlaps"]
    check_quiet(browser.events, url)


def check_quiet(events, url):
    """No error, no exception, and no request but the one for the file."""
    methods = [event["method"] for event in events]
    assert "Runtime.exceptionThrown" not in methods
    assert not [e for e in events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    requests = [e for e in events if e["method"] == "Network.requestWillBeSent"]
    addresses = {event["params"]["request"]["url"] for event in requests}
    assert addresses - {"data:,"} == {url}

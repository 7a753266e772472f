"""What the report says, in order: words, charts and tables."""

from __future__ import annotations

from jaxgrpo.study.report import facts, interval_charts, panel_charts, tables
from jaxgrpo.study.report.document import Chart, Part, Table
from jaxgrpo.study.result_types import Results

_AMPLIFICATION = (
    "The paper saw layers with more rank take a larger share of the gradient. LoRA's own algebra "
    "predicts some of that: with y = Wx + s·BAx an adapter's gradient grows as s·√r, so shares "
    "follow rank with a slope of +0.5 where s is constant, 0 where s = alpha/√r and −0.5 where s = "
    "alpha/r. The gradient of the frozen weight holds neither s nor r: only a real feedback can "
    "tilt it. Every adapter goes through the rank levels in turn, each draw with a seed and a "
    "uniform run of its own. The first interval inverts the randomisation test: it is about the "
    "mean of these layers, and exact where they have one slope. CR1 beside it is about layers "
    "like these; in simulations it covers 93.8 to 95.4 % with 8 or 28 of them."
)
_LAYERS = (
    "Norms measured in short runs at one rank everywhere. Raw L2: of the adapters' gradients; "
    "rank-free: divided by s·√r; per parameter: by the root of their number; full weight: of the "
    "frozen weight's gradient, in which no adapter occurs."
)
_DESIGN = (
    "Two factors, where the ranks are and where the first-order learning speed is, in blocks of "
    "one seed and one learning rate. P - U is the paper's comparison; the rank effect is (N + P - "
    "U - D) / 2, the speed effect (D + P - U - N) / 2. The design was written down before the "
    "first arm, and what lies outside it is refused. SHA-256 "
)
_INFERENCE = (
    "The run is the unit: accuracy = arm + seed + run, the runs' residual pooled over arms, and "
    "what the arms' own easy and hard items add; p and interval come from the same t. The primary "
    "difference is tested at the full level, 5 % or the look's, the others as a second family "
    "under Holm, with intervals as wide as that asks. “p of the margin” is of a true difference of "
    "the margin or more, the larger of two one-sided tests: equivalent is what has at most the "
    "level beside it. “p, these models” is the sign flip over items: it says nothing about another "
    "run of the same arm."
)
_ONE_SEED = "One seed: nothing is known of another run, so there is no p and no interval."
_SPEED = (
    "Speed is first-order: Σ s·r·g over the layers relative to uniform ranks, g being the "
    "profile's gradient norm. Where it is not 1, or moves between layers, an arm differs from "
    "uniform in its learning rates and not in its ranks alone."
)
_TIME = (
    "Time is that of all steps of all seeds; arms that were trained side by side share theirs, and "
    "each counts the whole of it."
)
_SCOPE = (
    "A plan made from a profile comes from one profile of one seed: the verdict is about this "
    "plan, not about the method that made it. Random draws a plan per seed, so its spread holds "
    "both. There is one evaluation split: if anything was tuned on it, accuracies lean high. Not "
    "told apart is not equal: only “equivalent” says that a difference lies within the margin."
)
_CUTS = (
    "PARA (arXiv 2604.27796) on the finished uniform adapters: one threshold for the singular "
    "values of all adapters together, no training after. A cut adapter shares its run with the "
    "uncut one, so seeds here say nothing of how far apart runs lie."
)
_PAPER = (
    "Published figures of arXiv 2605.07366 (Qwen2.5-1.5B-Instruct on GSM8K, 200 test items, one "
    "seed) and the same quantities here."
)


def make_sections(results: Results) -> dict[str, list[Part]]:
    """Title -> parts. What is not measured is left out: empty tables, sections of words alone."""
    sections = {
        "Does an allocation help?": _accuracy(results),
        "The factorial design": _design(results),
        "Training": _training(results),
        "Cut after training": _cuts(results),
        "Does rank draw gradient?": _amplification(results),
        "Where the gradient is": _layers(results),
        "Beside the paper": [_PAPER, tables.paper_table(results)],
        "Settings and versions": [
            tables.pair_table("Settings", results["settings"], "setting"),
            tables.pair_table("Versions", results["versions"], "package or device"),
        ],
    }
    for parts in sections.values():
        parts[:] = [part for part in parts if (part.rows if isinstance(part, Table) else part)]
    return {
        title: parts
        for title, parts in sections.items()
        if not all(isinstance(part, str) for part in parts)
    }


def _accuracy(results: Results) -> list[Part]:
    if not any(arm["accuracy"] is not None for arm in results["arms"]):
        return []
    seen = "Mean over seeds with its 95 % interval; small marks are single seeds."
    chart, table = interval_charts.accuracy_chart, tables.accuracy_table(results)
    parts: list[Part] = [Chart("accuracy", "Held-out accuracy per arm", seen, chart, table)]
    if results["contrasts"]:
        seen = (
            "Small marks pair runs of the same seed. Better, worse: the interval excludes 0. "
            "Equivalent: shown to lie within the margin. Open: neither."
        )
        parts.append(Chart("differences", "Differences", seen, interval_charts.difference_chart))
        inference = _ONE_SEED if results["residual"] is None else _INFERENCE
        parts += [facts.answer(results["verdict"])[1], tables.contrast_table(results), inference]
    return [*parts, tables.seed_table(results), tables.measure_table(results), _SCOPE]


def _design(results: Results) -> list[Part]:
    design = results["design"]
    if design is None:
        return []
    written = design["sha256"][:16] or "follows"
    used = f" Printed here is the look at {design['look']} blocks." if design["look"] else ""
    return [
        f"{_DESIGN}{written}.{used}",
        tables.pair_table("Cells", design["cells"], "cell"),
        tables.look_table(design),
        tables.interaction_table(design),
    ]


def _cuts(results: Results) -> list[Part]:
    seen = "Means over seeds, small marks are single ones; at 100 % stands the uncut adapter."
    title, chart = "Accuracy by what a cut keeps", panel_charts.cut_chart
    parts = [Chart("cuts", title, seen, chart, tables.cut_table(results)), _CUTS]
    return parts if results["cuts"] else []


def _amplification(results: Results) -> list[Part]:
    if not results["amplification"]:
        return []
    seen = (
        "If raw L2 sits on the predicted marks while the full weight sits on zero, LoRA's own "
        "parameterisation explains what looks like amplification."
    )
    title, chart = "How a layer's share depends on its rank", interval_charts.slope_chart
    words = {
        f"{facts.named(entry['view'])}, {entry['scale_rule']}": entry["words"]
        for entry in results["amplification"]
    }
    table = tables.pair_table("Slopes over the whole run", words, "view and scale rule")
    later = "A feedback would tilt the frozen weight's slope, more from left to right, as B grows."
    parts = tables.part_table(results)
    return [
        facts.answer(results["amplification_verdict"])[1],
        _AMPLIFICATION,
        Chart("slopes", title, seen, chart, table),
        Chart("phases", "The slope by phase and matrix", later, panel_charts.phase_chart, parts),
    ]


def _layers(results: Results) -> list[Part]:
    if not (results["profiles"] or results["allocations"]):
        return []
    seen = (
        "Layers from the first at the top; stripes mean that the same ones stay hot, speckle "
        "means noise. Steps without any gradient are blank."
    )
    share = "Share of the whole run's norm; bands are 95 % intervals over steps, not over seeds."
    maps, shares = panel_charts.heat_maps, panel_charts.share_chart
    notes = sorted({entry["note"] for entry in results["allocations"] if entry["note"]})
    ranks = "The dashed line is a plan's own mean." + "".join(f" Asterisk: {x}." for x in notes)
    chart, table = panel_charts.allocation_chart, tables.allocation_table(results)
    return [
        _LAYERS if results["profiles"] else "",
        Chart("heat-maps", "Gradient norm by layer and step", seen, maps),
        Chart("shares", "Importance: share of the norm per layer", share, shares),
        tables.concentration_table(results),
        tables.landscape_table(results),
        tables.spread_table(results),
        Chart("allocations", "Where each plan puts its ranks", ranks, chart, table),
    ]


def _training(results: Results) -> list[Part]:
    curve = "Mean over seeds with their range as a band; grey is uniform."
    drift = "Of sampled tokens; it should stay small, whatever the plan."
    apart = "Drift between sampler and trainer"
    if not any(arm["reward"].get("mean") for arm in results["arms"]):
        return []
    return [
        results["convergence"],
        Chart("reward", "Reward during training", curve, panel_charts.reward_chart),
        tables.training_table(results),
        _TIME,
        _SPEED if any(arm["speed"] for arm in results["arms"]) else "",
        Chart("drift", apart, drift, panel_charts.drift_chart),
    ]

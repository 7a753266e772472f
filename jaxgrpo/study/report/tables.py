"""The report's tables, the same for report.html and report.md."""

from __future__ import annotations

from jaxgrpo.study.gradient_types import Range
from jaxgrpo.study.report import facts
from jaxgrpo.study.report.document import Table
from jaxgrpo.study.report.facts import NONE, decimal, mean, percent, points, signed, span
from jaxgrpo.study.result_types import Contrast, DesignResult, Results

_ESTIMATE = ("points", "interval", "its level", "df", "p")


def accuracy_table(results: Results) -> Table:
    headings = ("arm", "accuracy", "95 % interval, %", "ranks", "sum of ranks", "parameters")
    rows = []
    for arm in results["arms"]:
        interval = span(arm["low"], arm["high"], facts.hundred)
        ends = dict.fromkeys(facts.finite([arm["rank_min"], arm["rank_max"]]))
        ranks = " to ".join(f"{end}" for end in ends) or NONE
        sizes = (facts.count(arm["total_rank"]), facts.count(arm["trainable_parameters"]))
        rows.append((arm["name"], percent(arm["accuracy"]), interval, ranks, *sizes))
    base = results["base"]
    if base:
        interval = span(base["low"], base["high"], facts.hundred)
        accuracy = percent(base["accuracy"])
        rows.append(("base model, untrained", accuracy, interval, NONE, NONE, NONE))
    return Table("Accuracy per arm", headings, rows)


def seed_table(results: Results) -> Table:
    """Runs of one seed beside each other, then paired; in a factorial a seed is a block."""
    arms = [arm for arm in results["arms"] if arm["per_seed"]]
    if not arms:
        return Table("", (), [])
    seeds, rates, measured = (arms[0][key] for key in ("seeds", "learning_rates", "per_seed"))
    names = [
        f"{'block' if results['design'] else 'seed'} {seed}"
        + (f", rate {rate:g}" if len(set(rates)) > 1 else "")
        for seed, rate, _ in zip(seeds, rates, measured, strict=False)
    ]
    rows = [(f"{arm['name']}, %", *(decimal(100 * x, 1) for x in arm["per_seed"])) for arm in arms]
    for found in results["contrasts"]:
        differences = (points(value) for value in found["per_seed"])
        rows.append((f"{found['name']}, points", *differences))
    return Table("Run by run", ("arm or difference", *names), rows)


def contrast_table(results: Results) -> Table:
    headings = ("difference", "verdict", *_ESTIMATE, "p (Holm)", "p, these models")
    headings += ("margin", "p of the margin", "needs", "detectable")
    rows = []
    for found in results["contrasts"]:
        holm = "primary" if found["family"] == "primary" else facts.p_value(found["p_holm"])
        size = found["detectable"]
        rest = (facts.p_value(found["fixed_models"]["p"]), f"±{100 * found['margin']:g}")
        level = found["equivalent_at"]
        rest += (facts.p_value(found["p_equivalent"]), NONE if level is None else f"≤ {level:.3f}")
        last = decimal(size and 100 * size, 1)
        rows.append((found["name"], found["verdict"], *_estimate(found), holm, *rest, last))
    return Table("Differences, the run being the unit", headings, rows, texts=2)


def _estimate(found: Contrast) -> tuple[str, ...]:
    interval = span(found["low"], found["high"], points)
    df = NONE if found["df"] is None else f"{found['df']:.3g}"
    level = f"{100 * found['confidence']:.4g} %"
    return (points(found["difference"]), interval, level, df, facts.p_value(found["p"]))


def measure_table(results: Results) -> Table:
    """Every decoding and answer rule, with what was cut off and how long completions are."""
    arms = [arm for arm in results["arms"] if arm["measures"]]
    headings: dict[str, None] = {}
    cells = []
    for arm in arms:
        found = {}
        for one in arm["measures"]:
            how = one["decoding"]
            found[f"{how}, {one['answer']}"] = percent(mean(one["per_seed"]), NONE)
            found[f"{how}, cut off"] = percent(mean(one["clipped_ratio"]), NONE)
            found[f"{how}, tokens"] = decimal(mean(one["mean_length"]), 0)
        headings |= dict.fromkeys(found)
        cells.append(found)
    rows = [
        (arm["name"], *(found.get(name, NONE) for name in headings))
        for arm, found in zip(arms, cells, strict=True)
    ]
    caption = "Accuracy by decoding and answer rule, completions cut at the limit, mean length"
    return Table(caption, ("arm", *headings), rows)


def look_table(design: DesignResult) -> Table:
    headings = ("look at blocks", "finished", "differs at", "equivalent at", "outcome")
    rows = []
    for look in design["looks"]:
        bounds = (f"p ≤ {look[at]:.4f}" for at in ("differs_at", "equivalent_at"))
        words = {True: "decided", False: "not decided", None: "not all runs are there"}
        said = words[look["decided"]]
        rows.append((str(look["blocks"]), str(look["finished"]), *bounds, said))
    return Table("Looks and their bounds", headings, rows)


def interaction_table(design: DesignResult) -> Table:
    headings = ("difference", "points per doubling", "95 % interval", "p", "df")
    rows = []
    for found in design["interactions"]:
        interval = span(found["low"], found["high"], points)
        rest = (interval, facts.p_value(found["p"]), f"{found['df']:g}")
        rows.append((found["name"], points(found["slope"]), *rest))
    return Table("Does a difference depend on the learning rate?", headings, rows)


def part_table(results: Results) -> Table:
    headings = ("scale rule", "view", "gradient of", "phase", "slope", "95 %, randomisation")
    rows = []
    for entry in results["amplification"]:
        for part in entry["parts"]:
            intervals = (
                span(part["low"], part["high"], signed),
                span(part["cr1_low"], part["cr1_high"], signed),
            )
            names = (entry["scale_rule"], *map(facts.named, (entry["view"], part["matrix"])))
            when = part["phase"] if part["draws"] == "all" else "all, one rank per layer"
            rows.append((*names, when, signed(part["slope"]), *intervals, part["verdict"]))
    headings = (*headings, "95 %, CR1 over layers", "follows rank")
    return Table("Slopes by phase and matrix", headings, rows, texts=4)


def spread_table(results: Results) -> Table:
    """Largest over smallest layer share, of a plan's runs and of the uniform runs beside them."""
    headings = ("run", "seeds", "first third", "middle third", "last third", "all steps")
    headings = (*headings, "range over seeds", "by LoRA's algebra")
    rows = []
    for found in results["spread"]:
        pairs = zip(found["own"], found["uniform"], strict=True)
        ratios = (f"{decimal(own['value'])} ({decimal(at['value'])})" for own, at in pairs)
        whole, foretold = found["own"][-1], found["foretold"]
        rows.append(
            (
                *(found["run"], str(found["seeds"]), *ratios),
                span(whole["low"], whole["high"]),
                "" if foretold is None else decimal(foretold["value"]),
            )
        )
    return Table("Largest over smallest layer share (the uniform runs' own)", headings, rows)


def landscape_table(results: Results) -> Table:
    """How unevenly uniform runs spread the gradient over layers, by objective and rank."""
    headings = ("uniform run", "objective", "seeds", "first third", "middle third", "last third")
    headings = (*headings, "all steps (range)", "top 30 % hold (range)", "early/late (range)")
    rows = []
    for found in results["landscape"]:
        *thirds, whole = found["max_min"]
        top, alike = found["top_share"], found["early_late"]
        ranges = (
            span(whole["low"], whole["high"]),
            span(top["low"], top["high"], facts.hundred),
            span(alike["low"], alike["high"], lambda end: decimal(end, 3)),
        )
        values = (
            decimal(whole["value"], 2, "infinite"),
            percent(top["value"]),
            decimal(alike["value"], 3, "not defined"),
        )
        rows.append(
            (
                *(found["run"], facts.named(found["objective"]), str(found["seeds"])),
                *(decimal(ratio["value"], 2, "infinite") for ratio in thirds),
                *(f"{value} ({ends})" for value, ends in zip(values, ranges, strict=True)),
            )
        )
    return Table(
        "Uniform runs: largest over smallest layer share, concentration, stability",
        headings,
        rows,
        texts=2,
    )


def concentration_table(results: Results) -> Table:
    """How unevenly the gradient is spread over layers, per profile and view."""
    headings = ("profile", "view", "largest / smallest share", "95 % interval", "top layers hold")
    rows = []
    for profile in results["profiles"]:
        for view, found in profile["views"].items():
            ratio, top = found["max_min"], found["top_share"]
            name = (facts.named(profile["objective"]), facts.named(view))
            spread = (decimal(ratio["value"], 2, "infinite"), span(ratio["low"], ratio["high"]))
            held = f"{percent(top['value'])} ({top['layers']} of {profile['layers']})"
            alike = decimal(found["early_late_correlation"], 3, "not defined")
            rows.append((*name, *spread, held, span(top["low"], top["high"], facts.hundred), alike))
    headings = (*headings, "95 % interval, %", "early/late correlation")
    return Table("How unevenly the gradient is spread", headings, rows, texts=2)


def allocation_table(results: Results) -> Table:
    headings = ("plan", "mean rank of layers 0, 1, 2, ...", "note")
    rows = []
    for entry in facts.distinct_allocations(results):
        ranks = " ".join(f"{rank:.1f}".removesuffix(".0") for rank in entry["layer_ranks"])
        rows.append((entry["plan"], ranks, entry["note"] or NONE))
    return Table("Ranks", headings, rows, texts=3, wraps=True)


def training_table(results: Results) -> Table:
    headings = ("arm", "reward, last quarter", "less the first arm's, 95 % interval", "KL to base")
    headings += ("drift", "steps clipped", "learning rate", "speed", "seeds", "time, s", "tokens/s")
    rows = []
    for arm in results["arms"]:
        clipped = percent(mean(arm["gradient_clipped"]), NONE)
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(arm["learning_rates"])) or NONE
        cost = (
            str(len(arm["seeds"])),
            decimal(mean([arm["seconds"]]), 0),
            facts.count(arm["tokens_per_s"]),
        )
        reward = decimal(mean(arm["reward_last_quarter"]), 3)
        less = arm["reward_difference"]
        against = f"{signed(less['value'], 3)} ({_ends(less)})" if less else NONE
        found = (reward, against, facts.small(mean(arm["kl_last_quarter"])))
        drift = facts.small(mean(arm["drift"].get("mean", [])))
        rows.append((arm["name"], *found, drift, clipped, rates, decimal(arm["speed"]), *cost))
    return Table("Training per arm", headings, rows)


def _ends(found: Range) -> str:
    return span(found["low"], found["high"], lambda end: signed(end, 3))


def cut_table(results: Results) -> Table:
    headings = ("what is left", "parameters", "accuracy", "less the uncut's, points", "by seed")
    rows = []
    for cut in results["cuts"]:
        means = (facts.count(mean(cut["parameters"])), percent(mean(cut["accuracy"])))
        by_seed = ", ".join(map(points, cut["difference"]))
        rows.append((cut["name"], *means, points(mean(cut["difference"])), by_seed))
    return Table("Cut after training, means over seeds", headings, rows)


def paper_table(results: Results) -> Table:
    headings = ("quantity", "the paper", "here", "note")
    rows = [(r["quantity"], r["paper"], r["ours"], r["note"] or NONE) for r in results["paper"]]
    return Table("Paper and here", headings, rows, texts=4, wraps=True)


def pair_table(caption: str, pairs: dict[str, str], heading: str) -> Table:
    return Table(caption, (heading, "value"), list(pairs.items()), texts=2, wraps=True)

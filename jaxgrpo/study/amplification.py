"""The amplification test: does a layer's share of the gradient follow its rank, and why?

numpy only, no jax.
"""

from __future__ import annotations

import json

import numpy as np

from jaxgrpo.stats import Interval
from jaxgrpo.study.config import StudyConfig, StudyFiles
from jaxgrpo.study.norms import read_norms
from jaxgrpo.study.result_types import Amplification, AmplificationPoint
from jaxgrpo.study.slopes import MECHANICAL_SLOPES, explanation, log_log_slope, signed


def amplification(config: StudyConfig, files: StudyFiles) -> list[Amplification]:
    """Per scale rule and view: how an adapter's share, relative to its share at uniform rank,
    depends on the rank it was given at random."""
    found: list[Amplification] = []
    for view in ("l2", "rank_free", "weight"):
        reference = read_norms(files.profile("grpo"), view)
        if reference is None:
            continue
        for rule in config.study.probe.scale_rules:
            points: list[AmplificationPoint] = []
            for draw in range(config.study.probe.draws):
                norms = read_norms(files.probe(rule, draw), view)
                path = files.plan(f"probe-{draw}")
                if norms is None or not path.is_file():
                    continue
                plan = json.loads(path.read_text(encoding="utf-8"))
                points += _points(norms, reference, plan["ranks"], f"random draw {draw}")
            if points:
                found.append(_slope(rule, view, points))
    return found


def _points(
    norms: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    ranks: dict[str, list[int]],
    name: str,
) -> list[AmplificationPoint]:
    total = sum(x.sum() for x in norms.values())
    before = sum(x.sum() for x in reference.values())
    points: list[AmplificationPoint] = []
    if not total or not before:
        return points  # no gradient, no shares
    for module, values in norms.items():
        share, was = values.sum(axis=0) / total, reference[module].sum(axis=0) / before
        for layer, rank in enumerate(ranks[module]):
            if rank > 0 and share[layer] > 0 and was[layer] > 0:
                points.append(
                    {
                        "arm": name,
                        "layer": layer,
                        "module": module,
                        "log_rank": float(np.log(rank)),
                        "log_share": float(np.log(share[layer] / was[layer])),
                    }
                )
    return points


def _slope(rule: str, view: str, points: list[AmplificationPoint]) -> Amplification:
    slope = _fit(points)
    predicted = MECHANICAL_SLOPES[rule] if view == "l2" else 0.0
    inside = "inside" if slope.low <= predicted <= slope.high else "outside"
    words = (
        f"{signed(slope.value)} ({signed(slope.low)} to {signed(slope.high)}); "
        f"{predicted:+.1f} is predicted and lies {inside} the interval"
    )
    return {
        "scale_rule": rule,
        "view": view,
        "predicted": predicted,
        "slope": slope.value,
        "low": slope.low,
        "high": slope.high,
        "margin": 0.25,
        "parts": [],
        "points": points,
        "words": words,
    }


def _fit(points: list[AmplificationPoint]) -> Interval:
    """Slope of log share ratio on log rank; the points of one layer are one cluster."""
    x, y = (np.array([p["log_rank"] for p in points]), np.array([p["log_share"] for p in points]))
    return log_log_slope(x, y, np.array([p["layer"] for p in points]))


def amplification_verdict(found: list[Amplification]) -> list[str]:
    raw = {
        a["scale_rule"]: Interval(a["slope"], a["low"], a["high"])
        for a in found
        if a["view"] == "l2"
    }
    if not raw:
        return []
    # The view that no rank enters is one question, whatever the rule: all probes answer it.
    pooled = [point for a in found if a["view"] == "weight" for point in a["points"]]
    _, sentence = explanation(raw, _fit(pooled) if pooled else None)
    outside = [
        a["scale_rule"]
        for a in found
        if a["view"] == "l2" and not a["low"] <= a["predicted"] <= a["high"]
    ]
    where = (
        f"Outside its interval lies the prediction for {', '.join(outside)}."
        if outside
        else "Every prediction lies inside its interval."
    )
    return [sentence, where]

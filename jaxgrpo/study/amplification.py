"""The amplification test: does a layer's share of the gradient follow its rank, and why?

By thirds of the steps, since a feedback grows, and by matrix: at the start all of a raw norm is
that of B, whose slope is LoRA's algebra. numpy only, no jax.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

import numpy as np

from jaxgrpo.stats import Interval
from jaxgrpo.study.config import StudyConfig, StudyFiles, list_arms
from jaxgrpo.study.importance import max_min_ratio, shares
from jaxgrpo.study.norms import layer_norms, read_norms
from jaxgrpo.study.result_types import Amplification, AmplificationPoint, SlopePart, Spread
from jaxgrpo.study.slopes import (
    MECHANICAL_SLOPES,
    SLOPE_MARGIN,
    Fit,
    explanation,
    fit_slope,
    signed,
)

Phase = Literal["all", "first third", "middle third", "last third"]
PHASES: tuple[Phase, ...] = ("all", "first third", "middle third", "last third")
Matrix = Literal["both", "A", "B", "W"]
Norms = Mapping[str, np.ndarray]
Read = Callable[..., dict[str, np.ndarray] | None]
"""`read_norms`, or one that remembers."""


def steps_of(phase: Phase, steps: int) -> slice:
    """The steps of a phase; thirds differ by a step at most."""
    edges = [0, steps // 3, 2 * steps // 3, steps]
    place = PHASES.index(phase)
    return slice(0, steps) if place == 0 else slice(edges[place - 1], edges[place])


def amplification(config: StudyConfig, files: StudyFiles) -> list[Amplification]:
    """Per scale rule and view: how an adapter's share, relative to its share at uniform rank,
    depends on the rank it was given at random."""
    read = cache(read_norms)  # a long run's file takes seconds to read
    found: list[Amplification] = []
    for view in ("l2", "rank_free", "weight"):
        for rule in config.study.probe.scale_rules:
            points = _points(config, files, read, view, rule, None, "all")
            if points:
                parts = _parts(config, files, read, view, rule)
                found.append(_slope(rule, view, points, parts))
    return found


def _parts(
    config: StudyConfig, files: StudyFiles, read: Read, view: str, rule: str
) -> list[SlopePart]:
    """Every phase of both matrices together, and of raw norms also of each by itself."""
    parts: list[SlopePart] = []
    matrices: list[tuple[Matrix, Literal["a", "b"] | None]] = [
        ("W" if view == "weight" else "both", None)
    ]
    if view == "l2":
        matrices.append(("A", "a"))
        matrices.append(("B", "b"))
    for matrix, key in matrices:
        for phase in PHASES:
            points = _points(config, files, read, view, rule, key, phase)
            if len({p["layer"] for p in points}) < 2:
                continue
            fit = _fit(points)
            parts.append(
                {
                    "phase": phase,
                    "matrix": matrix,
                    "slope": fit.value,
                    "low": fit.low,
                    "high": fit.high,
                    "cr1_low": fit.cr1_low,
                    "cr1_high": fit.cr1_high,
                    "verdict": fit.verdict(),
                }
            )
    return parts


def _points(
    config: StudyConfig,
    files: StudyFiles,
    read: Read,
    view: str,
    rule: str,
    matrix: Literal["a", "b"] | None,
    phase: Phase,
) -> list[AmplificationPoint]:
    reference = read(files.profile("grpo"), view, matrix)
    points: list[AmplificationPoint] = []
    for draw in range(config.study.probe.draws if reference else 0):
        norms = read(files.probe(rule, draw), view, matrix)
        path = files.plan(f"probe-{draw}")
        if reference is None or norms is None or not path.is_file():
            continue
        ranks = json.loads(path.read_text(encoding="utf-8"))["ranks"]
        own, before = (_sums(x, phase) for x in (norms, reference))
        for module, values in own.items():
            for layer, rank in enumerate(ranks[module]):
                share, was = values[layer], before[module][layer]
                if rank > 0 and share > 0 and was > 0:
                    points.append(
                        {
                            "arm": f"random draw {draw}",
                            "layer": layer,
                            "module": module,
                            "log_rank": float(np.log(rank)),
                            "log_share": float(np.log(share / was)),
                        }
                    )
    return points


def _sums(norms: Norms, phase: Phase) -> dict[str, np.ndarray]:
    """module -> [L], each adapter's part of all norms in a phase; 0 where there is none."""
    steps = steps_of(phase, len(next(iter(norms.values()))))
    sums = {module: values[steps].sum(axis=0) for module, values in norms.items()}
    total = sum(values.sum() for values in sums.values())
    return {module: values / (total or 1.0) for module, values in sums.items()}


def _slope(
    rule: str, view: str, points: list[AmplificationPoint], parts: list[SlopePart]
) -> Amplification:
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
        "margin": SLOPE_MARGIN,
        "parts": parts,
        "points": points,
        "words": words,
    }


def _fit(points: list[AmplificationPoint]) -> Fit:
    """Slope of log share on log rank, with an intercept for every draw and module."""
    x, y = (np.array([p["log_rank"] for p in points]), np.array([p["log_share"] for p in points]))
    blocks = np.array([f"{p['arm']} {p['module']}" for p in points])
    return fit_slope(x, y, blocks, np.array([p["layer"] for p in points]))


def spread(config: StudyConfig, files: StudyFiles) -> list[Spread]:
    """Largest over smallest raw layer share of the first seed's run of each plan, by thirds and
    over all steps, and that of the uniform run: it grows without any rank moving, too."""
    first: dict[str, list[float | None]] = {}
    for arm in list_arms(config):
        if arm.group not in first and (norms := read_norms(files.arm(arm), "l2")) is not None:
            by_layer = layer_norms(norms)
            first[arm.group] = [
                _ratio(by_layer[steps_of(phase, len(by_layer))]) for phase in (*PHASES[1:], "all")
            ]
    uniform = next((group for group in first if group.startswith("uniform")), None)
    if uniform is None:
        return []
    return [
        {"run": group, "uniform": first[uniform], "own": own}
        for group, own in first.items()
        if group != uniform
    ]


def _ratio(norms: np.ndarray) -> float | None:
    if not norms.size or not norms.any():
        return None
    ratio = max_min_ratio(shares(norms))
    return ratio if np.isfinite(ratio) else None


def amplification_verdict(found: list[Amplification]) -> list[str]:
    raw = {
        a["scale_rule"]: Interval(a["slope"], a["low"], a["high"])
        for a in found
        if a["view"] == "l2"
    }
    if not raw:
        return []
    # The view that no rank enters is one question, whatever the rule: all probes answer it.
    pooled = [
        point | {"arm": f"{a['scale_rule']} {point['arm']}"}
        for a in found
        if a["view"] == "weight"
        for point in a["points"]
    ]
    _, sentence = explanation(raw, _fit(pooled).interval if pooled else None)  # type: ignore[arg-type]
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
    late = [
        f"{signed(part['slope'])} [{signed(part['low'])}, {signed(part['high'])}] under "
        f"{a['scale_rule']}, {part['verdict']}"
        for a in found
        if a["view"] == "weight"
        for part in a["parts"]
        if part["phase"] == "last third"
    ]
    grown = f"In the last third of the steps the full-weight slope is {'; '.join(late)}."
    return [sentence, where, *([grown] if late else [])]

"""The amplification test: does a layer's share of the gradient follow its rank, and why?

By thirds of the steps, since a feedback grows, and by matrix: at the start all of a raw norm is
that of B, whose slope is LoRA's algebra. numpy only, no jax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

import numpy as np

from jaxgrpo.stats import Interval
from jaxgrpo.study.config import StudyConfig, StudyFiles
from jaxgrpo.study.gradient_types import Amplification, SlopePart
from jaxgrpo.study.norms import read_norms
from jaxgrpo.study.slopes import (
    MECHANICAL_SLOPES,
    SLOPE_MARGIN,
    Fit,
    RankDesign,
    explanation,
    signed,
)

Phase = Literal["all", "first third", "middle third", "last third"]
PHASES: tuple[Phase, ...] = ("all", "first third", "middle third", "last third")
Draws = Literal["all", "by layer"]
"""by layer: those in which the modules of a layer share a rank."""
Matrix = Literal["both", "A", "B", "W"]
Norms = Mapping[str, np.ndarray]

FOLLOWS = {
    "follows": "it follows rank",
    "against": "it falls with rank",
    "does not": "it does not follow rank",
    "open": "open",
}
"""A slope's verdict in a sentence."""


def steps_of(phase: Phase, steps: int) -> slice:
    """The steps of a phase; thirds differ by a step at most."""
    edges = [0, steps // 3, 2 * steps // 3, steps]
    place = PHASES.index(phase)
    return slice(0, steps) if place == 0 else slice(edges[place - 1], edges[place])


class Probes:
    """What a study's probes measured, each beside the uniform run of its own seed."""

    def __init__(self, config: StudyConfig, files: StudyFiles) -> None:
        self._files, self._rules = files, config.study.probe.scale_rules
        self._read = cache(read_norms)  # a long run's file takes seconds to read
        plans = [files.plan(f"probe-{draw}") for draw in range(config.study.probe.runs)]
        plans = plans if all(path.is_file() for path in plans) else []
        ranks = [json.loads(path.read_text(encoding="utf-8"))["ranks"] for path in plans]
        self._modules = list(ranks[0]) if ranks else []
        log_rank = np.log([[one[m] for m in self._modules] for one in ranks])
        by_layer = np.arange(len(ranks)) >= config.study.probe.draws
        self._draws = {"all": slice(None), "by layer": by_layer}
        self._designs = {
            draws: RankDesign(log_rank[which], by_layer[which])
            for draws, which in self._draws.items()
            if ranks
        }

    def slopes(self) -> list[Amplification]:
        """Per scale rule and view: how an adapter's share, relative to its share at uniform rank,
        depends on the rank it was given."""
        found: list[Amplification] = []
        for view in ("l2", "rank_free", "weight"):
            for rule in self._rules:
                fit = self._fit([rule], view)
                if fit is not None:
                    found.append(_slope(rule, view, fit, self._parts(rule, view)))
        return found

    @property
    def drawn(self) -> str:
        """In how many draws something was measured: "3 of 6"."""
        there = {
            draw
            for rule in self._rules
            for draw, ratios in enumerate(self._ratios(rule, "l2", None, "all"))
            if np.isfinite(ratios).any()
        }
        return f"{len(there)} of {len(self._draws['by layer'])}"

    def of_weights(self) -> Fit | None:
        """Of the view that no rank enters: one question whatever the rule, all probes answer it."""
        return self._fit(self._rules, "weight")

    def _parts(self, rule: str, view: str) -> list[SlopePart]:
        """Every phase of both matrices together, and of raw norms also of each by itself."""
        matrices: list[tuple[Matrix, Literal["a", "b"] | None]] = [("both", None)]
        if view == "weight":
            matrices = [("W", None)]
        elif view == "l2":
            matrices = [("both", None), ("A", "a"), ("B", "b")]
        kinds: list[tuple[Phase, Draws]] = [(phase, "all") for phase in PHASES]
        kinds.append(("all", "by layer"))
        parts: list[SlopePart] = []
        for matrix, key in matrices:
            for phase, draws in kinds:
                fit = self._fit([rule], view, key, phase, draws)
                if fit is not None:
                    parts.append(_part(phase, draws, matrix, fit))
        return parts

    def _fit(
        self,
        rules: Sequence[str],
        view: str,
        matrix: Literal["a", "b"] | None = None,
        phase: Phase = "all",
        draws: Draws = "all",
    ) -> Fit | None:
        """None where too little was measured."""
        ratios = [self._ratios(rule, view, matrix, phase) for rule in rules if self._designs]
        measured = [one for one in ratios if np.isfinite(one).any()]
        if not measured:
            return None
        return self._designs[draws].fit(np.array(measured)[:, self._draws[draws]])

    def _ratios(
        self, rule: str, view: str, matrix: Literal["a", "b"] | None, phase: Phase
    ) -> np.ndarray:
        """[D, M, L]: ln of an adapter's share less that at uniform rank; NaN where not measured."""
        found = []
        for draw in range(len(self._draws["by layer"])):
            runs = (self._files.probe(rule, draw), self._files.uniform(draw))
            own, before = (
                None if norms is None else _shares(norms, self._modules, phase)
                for norms in (self._read(run, view, matrix) for run in runs)
            )
            found.append(None if own is None or before is None else _log_ratio(own, before))
        shape = next((one.shape for one in found if one is not None), (1, 1))
        return np.array([np.full(shape, np.nan) if one is None else one for one in found])


def _log_ratio(own: np.ndarray, before: np.ndarray) -> np.ndarray:
    known = (own > 0) & (before > 0)
    return np.log(np.where(known, own, np.nan) / np.where(known, before, np.nan))


def _shares(norms: Norms, modules: Sequence[str], phase: Phase) -> np.ndarray:
    """[M, L], each adapter's part of all norms in a phase; 0 where there is none."""
    steps = steps_of(phase, len(next(iter(norms.values()))))
    sums = np.array([norms[module][steps].sum(axis=0) for module in modules])
    return sums / (sums.sum() or 1.0)


def _part(phase: Phase, draws: Draws, matrix: Matrix, fit: Fit) -> SlopePart:
    return {
        "phase": phase,
        "draws": draws,
        "matrix": matrix,
        "slope": fit.value,
        "low": fit.low,
        "high": fit.high,
        "cr1_low": fit.cr1_low,
        "cr1_high": fit.cr1_high,
        "verdict": fit.verdict(),
    }


def _slope(rule: str, view: str, slope: Fit, parts: list[SlopePart]) -> Amplification:
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
        "words": words,
    }


def _beside_margin(a: Amplification) -> str:
    return "within" if abs(a["slope"] - a["predicted"]) <= SLOPE_MARGIN else "beyond"


def amplification_verdict(
    found: Sequence[Amplification], of_weights: Fit | None, drawn: str
) -> list[str]:
    """Which explanation survives, what lies outside its interval, and where the slopes end.

    drawn: which draws it is of, "3 of 6".
    """
    raw = {
        a["scale_rule"]: Interval(a["slope"], a["low"], a["high"])
        for a in found
        if a["view"] == "l2"
    }
    if not raw:
        return []
    _, sentence = explanation(raw, of_weights and of_weights.interval)
    outside = [
        f"{a['scale_rule']}, {_beside_margin(a)} the margin of {SLOPE_MARGIN:g}"
        for a in found
        if a["view"] == "l2" and not a["low"] <= a["predicted"] <= a["high"]
    ]
    where = (
        f"Outside its interval lies the prediction for {'; '.join(outside)}."
        if outside
        else "Every prediction lies inside its interval."
    )
    late = [
        f"{signed(part['slope'])} [{signed(part['low'])}, {signed(part['high'])}] under "
        f"{a['scale_rule']}: {FOLLOWS[part['verdict']]}"
        for a in found
        if a["view"] == "weight"
        for part in a["parts"]
        if part["phase"] == "last third"
    ]
    grown = f"In the last third of the steps the full-weight slope is {'; '.join(late)}."
    return [sentence, f"Measured in {drawn} draws.", where, *([grown] if late else [])]

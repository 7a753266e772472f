"""AdaLoRA's allocation for plain LoRA: scores of ranks, cubic budget, global top-b (2303.10512).

AdaLoRA trains P diag(E) Q and masks entries of E; here a rank is a column of A with a row of B, and
the mask is the rank plan's. A masked rank has no gradient: its score decays and it does not come
back, which AdaLoRA's can. The entries' scores are `grpo/sensitivity.py`'s. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxgrpo.config import ConfigError
from jaxgrpo.study.budget import largest_within


def triplet_scores(a_score: np.ndarray, b_score: np.ndarray, e_score: np.ndarray) -> np.ndarray:
    """Scores of ranks [L, R]: mean over A's column plus mean over B's row plus E's (eq. 7).

    Args:
        a_score: mean * uncertainty of the entries of A, [L, in, R].
        b_score: the same of B, [L, R, out].
        e_score: the same of the factors between them, [L, R].
    """
    return a_score.mean(axis=1) + b_score.mean(axis=2) + e_score


def budget_at(
    step: int,
    *,
    initial: int,
    target: int,
    total_steps: int,
    t_init: int,
    t_final: int,
    delta_t: int = 1,
) -> tuple[int, bool]:
    """What the ranks may cost at `step`, and whether they are chosen anew there (§3.3).

    `initial` up to and at t_init, then target + (initial - target) * (1 - progress)^3 rounded down,
    chosen anew at multiples of delta_t, and `target` once step > total_steps - t_final. Ranks are
    chosen at every step of that last phase, as in PEFT, so scores must no longer change there.
    """
    if not 0 < target <= initial:
        raise ConfigError(f"adalora: target {target} must lie in 1..{initial}, the initial budget")
    if t_init < 0 or t_final < 0 or t_init >= total_steps - t_final:
        raise ConfigError(
            f"adalora: t_init {t_init} and t_final {t_final} leave no step of {total_steps} to "
            "reduce the budget in; lower one"
        )
    if delta_t < 1:
        raise ConfigError(f"adalora: delta_t must be at least 1, got {delta_t}")
    if step <= t_init:
        return initial, False
    if step > total_steps - t_final:
        return target, True
    left = 1 - (step - t_init) / (total_steps - t_final - t_init)
    return int((initial - target) * left**3 + target), step % delta_t == 0


def select(
    scores: Mapping[str, np.ndarray], budget: int, costs: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Keeps the best ranks of all modules and layers that cost the budget: module -> bool [L, R].

    The authors count ranks; with `costs`, what a rank of each module costs, the budget is spent to
    the unit, or to the most below it that whole ranks can cost (`largest_within`). Equal scores:
    the first in the mapping's order, then layer, then rank. (PEFT's threshold drops every rank that
    ties with the first one out, and so may keep fewer.) Ranks with a negative score never stay.
    """
    pooled = np.concatenate([np.zeros(0), *(score.ravel() for score in scores.values())])
    prices = np.repeat(
        [1 if costs is None else costs[module] for module in scores],
        [score.size for score in scores.values()],
    )
    alive = pooled >= 0
    total = int(prices[alive].sum())
    if not np.isfinite(pooled).all():
        raise ConfigError("adalora: scores must be finite")
    if not 0 <= budget <= total:
        raise ConfigError(
            f"adalora: a budget of {budget} is not in 0..{total}, what the ranks there are cost"
        )
    kept = np.zeros(len(pooled), bool)
    kept[alive] = largest_within(pooled[alive], prices[alive], budget)
    masks, start = {}, 0
    for module, score in scores.items():
        masks[module] = kept[start : start + score.size].reshape(score.shape)
        start += score.size
    return masks

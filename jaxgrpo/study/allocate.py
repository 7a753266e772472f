"""Rank allocation methods: from importance per module and layer to ranks that spend a budget.

Each method says in which ratio the ranks should stand, `budget.py` makes whole ranks of that. Every
result costs the budget to the unit and lies within its bounds, or the call raises. numpy only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np

from jaxgrpo.config import ConfigError, ScaleRule, suggestion
from jaxgrpo.study.budget import (
    Budget,
    Slots,
    apportion,
    check_limits,
    largest_within,
    reachable,
    unreachable,
)
from jaxgrpo.study.problem import Combine, Problem, make_problem

# Importances further below the largest count as this share of it, as does 0; squares and inverses
# then stay within float64.
_FLOOR = 1e-120


def allocate(
    method: str,
    importance: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, int]],
    budget: Budget,
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Ranks by `method`: module -> int array [L], as `RankPlan.ranks` wants them.

    Args:
        method: a name in METHODS.
        importance: module -> [L], none negative; for `eva` module -> [L, R].
        shapes: module -> (in_features, out_features).
        seed: for `random` only.
        options: what the method takes besides; see its function.

    Raises:
        ConfigError: an unknown method or option, importances that are negative, not finite or all
            zero, or a budget that the bounds do not allow or no whole ranks add up to.
    """
    if method not in METHODS:
        raise ConfigError(
            f"unknown allocation method '{method}'; {suggestion(method, list(METHODS))}"
        )
    function = METHODS[method]
    problem = make_problem(importance, shapes, budget, dimensions=2 if method == "eva" else 1)
    if function is not reduced:  # whose own budget is smaller
        check_limits(problem.slots, budget.total, budget.unit)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    known = [p.name for p in parameters if p.name != "seed"]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"allocation method '{method}' has no option '{name}'; "
                + (suggestion(name, known) if known else "it takes none")
            )
    for p in parameters:
        if p.default is inspect.Parameter.empty and p.name != "seed" and p.name not in options:
            raise ConfigError(f"allocation method '{method}' needs the option '{p.name}'")
    if len(known) != len(parameters):
        options["seed"] = seed
    return problem.by_module(function(problem, **options))


def spent(
    ranks: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], unit: str = "ranks"
) -> int:
    """What ranks cost in a budget's unit, over every adapter."""
    if unit == "ranks":
        return int(sum(r.sum() for r in ranks.values()))
    return int(sum(r.sum() * sum(shapes[module]) for module, r in ranks.items()))


def _shares(weights: np.ndarray, slots: Slots) -> np.ndarray:
    """Ratios of ranks that give each slot a share of the budget, whatever a rank costs there."""
    return weights / slots.costs


def uniform(problem: Problem) -> np.ndarray:
    """One rank everywhere (LoRA, 2106.09685); a remainder goes to the first slots."""
    n = len(problem.slots.costs)
    return problem.solve(np.ones(n), np.zeros(n))


def proportional(problem: Problem, combine: Combine = "root_sum_square") -> np.ndarray:
    """Share of the L2 gradient norm times the budget (2605.07366).

    The paper bounds ranks to 20..40 without saying how its total stays; here by water-filling. How
    it combines the norms of a layer is not published: `root_sum_square` is the norm of the layer's
    whole gradient, `sum` adds the modules' norms.
    """
    values = problem.by_slot(combine)
    return problem.solve(_shares(np.maximum(values, _FLOOR), problem.slots), values)


def inverse(problem: Problem, combine: Combine = "root_sum_square") -> np.ndarray:
    """Share of 1 / importance times the budget: the control that `proportional` must beat."""
    values = problem.by_slot(combine)
    return problem.solve(_shares(1.0 / np.maximum(values, _FLOOR), problem.slots), -values)


def random(problem: Problem, seed: int) -> np.ndarray:
    """Ranks in the ratio of draws from U(0.5, 1.5), the paper's control (2605.07366: 16..48 of 32).

    Draws are per slot, so a layer's modules share one under layer granularity.
    """
    draws = np.random.default_rng(seed).uniform(0.5, 1.5, len(problem.slots.costs))
    return problem.solve(draws, draws)


def reduced(
    problem: Problem, fraction: float = 0.7, combine: Combine = "root_sum_square"
) -> np.ndarray:
    """`proportional` on the largest spendable budget up to `fraction` of the whole (2605.07366).

    The bounds are those of the smaller plan.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"allocation: fraction must lie in (0, 1], got {fraction}")
    budget, slots = problem.budget, problem.slots
    # 0.7 * 90 is 62.99... in float64; nobody means 62 by that.
    wanted = int(np.floor(fraction * budget.total * (1 + 1e-12)))
    check_limits(slots, wanted, budget.unit)
    total, _ = reachable(slots, wanted)
    assert total is not None  # the least of the limits is reachable
    values = problem.by_slot(combine)
    ratios = _shares(np.maximum(values, _FLOOR), slots)
    return apportion(ratios, values, slots, total, budget.unit)


def top_k(problem: Problem, k: int, combine: Combine = "root_sum_square") -> np.ndarray:
    """The budget spread uniformly on the k most important layers, the others at `min_rank`.

    Layers are chosen whole under either granularity; of equal ones the first.
    """
    layers = problem.values.shape[1]
    if not (isinstance(k, int | np.integer) and 1 <= k <= layers):
        raise ConfigError(f"allocation: k must be a whole number in 1..{layers}, got {k}")
    importance = problem.by_layer(combine)
    if not importance.max() > 0:
        raise ConfigError("allocation: every importance is 0, there is nothing to rank by")
    chosen = np.zeros(layers, bool)
    chosen[np.argsort(-importance, kind="stable")[:k]] = True
    slots, budget = problem.slots, problem.budget
    least, most = (limit // layers for limit in slots.limits())  # layers are all alike
    if least * (layers - k) + most * k < budget.total:
        smallest = -(-(budget.total - least * layers) // (most - least))
        raise ConfigError(
            f"allocation: k={k} layers at their largest rank, the others at their smallest, cost "
            f"{least * (layers - k) + most * k} of the {budget.total} {budget.unit}; the smallest "
            f"k that spends them is {smallest} of {layers} layers"
        )
    chosen = np.tile(chosen, len(slots.costs) // layers)
    high = np.where(chosen, slots.high, slots.low)
    slots = Slots(slots.costs, slots.low, high, slots.name)
    return problem.solve(np.ones(len(high)), np.zeros(len(high)), slots)


def fim(problem: Problem) -> np.ndarray:
    """FIM-LoRA's ranks (2605.16800): in the ratio of the mean squared gradient of B.

    Importance is the mean over B's entries of the squared gradient, averaged over batches, at B = 0
    (where A's gradient is 0): Fisher information where the loss is a log-likelihood; under GRPO the
    second moment of the advantage-weighted gradient. The authors share out a sum of ranks, so the
    *rank* is proportional to the score, whatever the budget counts. `max_rank` defaults to twice
    the mean rank. Their code lifts slots below `min_rank` afterwards, paid for only by unsaturated
    slots above it: with min_rank at the mean rank or more it overspends (r = min_rank = 8: +25 %).
    Here the minimum is part of the water-filling. Their scale alpha / r is the study's to choose.
    """
    slots, budget = problem.slots, problem.budget
    if budget.max_rank is None:
        mean = budget.total / int(slots.costs.sum())
        cap = max(int(2 * mean), int(np.ceil(mean)), budget.min_rank)
        slots = Slots(slots.costs, slots.low, np.minimum(slots.high, cap), slots.name)
    values = problem.by_slot("sum")
    return problem.solve(np.maximum(values, _FLOOR), values, slots)


def gora(problem: Problem) -> np.ndarray:
    """GoRA's ranks (2502.12171): *parameters* in the ratio of mean|W * G|, whatever the budget.

    rank = share of the parameters / (in + out), clipped. The authors' code floors and clips each
    rank on its own, which misses the budget; here what clipping and rounding leave is shared out
    again. Their initialisation of B, scale and LoRA+ are not part of it.
    """
    values = problem.by_slot("sum")
    ratios = np.maximum(values, _FLOOR) / problem.sizes
    # Division rounds; what it made equal keeps the order it had.
    pairs = np.stack([ratios, values], axis=1)
    order = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    return problem.solve(ratios, order)


def eva(problem: Problem, rho: float = 2.0) -> np.ndarray:
    """EVA (2410.07170): the largest of all adapters' explained variance ratios win a rank each.

    Importance is module -> [L, R], the ratios of the layer input's principal components, falling;
    modules with a common input (q, k, v; gate, up) bring equal ones. An adapter gets at most
    round(rho * mean rank). Ties go to the earlier module, then layer; `min_rank` is granted first.
    The authors count ranks. A budget of parameters is spent on the same pool, largest first, until
    it is used up (`largest_within`). EVA's initialisation of A is not part of it.
    """
    budget, values = problem.budget, problem.values
    if budget.granularity != "module":
        raise ConfigError(
            "allocation method 'eva' pools the components of single adapters: it needs a budget "
            "with granularity='module'"
        )
    if not rho >= 1:
        raise ConfigError(f"allocation: rho must be at least 1, got {rho}")
    if (np.diff(values, axis=2) > 0).any():
        raise ConfigError("allocation: explained variance ratios must fall along the components")
    slots = problem.slots
    ratios = values.reshape(len(slots.costs), -1)
    mean = budget.total / int(slots.costs.sum())
    cap = min(round(rho * mean), ratios.shape[1])
    slots = Slots(slots.costs, slots.low, np.minimum(slots.high, cap), slots.name)
    check_limits(slots, budget.total, budget.unit)
    component = np.arange(ratios.shape[1])
    open_ = (component >= slots.low[:, None]) & (component < slots.high[:, None])
    pool = np.flatnonzero(open_.ravel())
    owners = pool // ratios.shape[1]
    # Ties go to the first, and ratios fall within an adapter: what is taken of it is a prefix.
    costs = slots.costs[owners]
    taken = largest_within(ratios.ravel()[pool], costs, budget.total - slots.limits()[0])
    if slots.limits()[0] + int(costs[taken].sum()) != budget.total:
        raise ConfigError(unreachable(slots, budget.total, budget.unit))
    return slots.low + np.bincount(owners[taken], minlength=len(ratios))


def equalised(
    problem: Problem, scale_rule: ScaleRule, combine: Combine = "root_sum_square"
) -> np.ndarray:
    """Ranks at which the predicted gradient share of every slot is the same (ours).

    A LoRA gradient norm grows as s(r) * sqrt(r) * g with g the rank-free importance. `constant`:
    share ~ sqrt(r) * g, so r ~ 1 / g^2. `alpha_over_r`: g / sqrt(r), so r ~ g^2. `rslora`: the
    share does not depend on the rank.
    """
    if scale_rule not in get_args(ScaleRule):
        raise ConfigError(
            f"unknown scale_rule '{scale_rule}'; {suggestion(str(scale_rule), get_args(ScaleRule))}"
        )
    if scale_rule == "rslora":
        raise ConfigError(
            "allocation method 'equalised': under rslora the gradient share grows as r^0, no rank "
            "can flatten it; use scale_rule constant or alpha_over_r"
        )
    values = problem.by_slot(combine)
    floored = np.maximum(values, _FLOOR)
    if scale_rule == "constant":
        return problem.solve(1.0 / (floored * floored), -values)
    return problem.solve(floored * floored, values)


METHODS: dict[str, Callable[..., np.ndarray]] = {
    function.__name__: function
    for function in (
        uniform,
        proportional,
        inverse,
        random,
        reduced,
        top_k,
        fim,
        gora,
        eva,
        equalised,
    )
}
"""Name -> function (Problem, options) -> int ranks of its slots."""

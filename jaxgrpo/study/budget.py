"""Rank budgets spent exactly: water-filling over real ranks, then whole ranks that add up.

Every method of `allocate.py` says in which ratio the ranks should stand; this module turns ratios
into whole ranks within bounds whose cost is the budget, or says why there are none. numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jaxgrpo.config import MAX_RANK, ConfigError, suggestion

Unit = Literal["ranks", "parameters"]
Granularity = Literal["layer", "module"]


@dataclass(frozen=True)
class Budget:
    """How much the ranks may cost in all, and what one rank may be.

    Attributes:
        total: what the plan must cost, to the unit.
        unit: ranks (summed over every adapter, layers x modules) or parameters (a rank of a
            projection costs in + out).
        min_rank: smallest rank of an adapter; 0 switches adapters off.
        max_rank: largest rank of an adapter, at most min(in, out) whatever is given here.
        granularity: layer gives one rank to all modules of a layer, so that a layer's rank costs
            the number of modules (or the parameters of all of them); module ranks each adapter.
    """

    total: int
    unit: Unit = "ranks"
    min_rank: int = 1
    max_rank: int | None = None
    granularity: Granularity = "layer"

    def __post_init__(self) -> None:
        for name, choices in (("unit", get_args(Unit)), ("granularity", get_args(Granularity))):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"budget: unknown {name} '{value}'; {suggestion(str(value), choices)}"
                )
        for name in ("total", "min_rank", "max_rank"):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole and not (name == "max_rank" and value is None):
                raise ConfigError(f"budget: {name} must be a whole number, got {value!r}")
        if self.total < 1:
            raise ConfigError(f"budget: total must be at least 1, got {self.total}")
        if not 0 <= self.min_rank <= MAX_RANK:
            raise ConfigError(f"budget: min_rank must lie in 0..{MAX_RANK}, got {self.min_rank}")
        if self.max_rank is not None and not max(1, self.min_rank) <= self.max_rank <= MAX_RANK:
            raise ConfigError(
                f"budget: max_rank must lie in {max(1, self.min_rank)}..{MAX_RANK} "
                f"(min_rank is {self.min_rank}), got {self.max_rank}"
            )


@dataclass(frozen=True)
class Slots:
    """What ranks are given to: layers or single adapters, as int arrays [n].

    Attributes:
        costs: the price of one rank, in the budget's unit.
        low, high: smallest and largest rank allowed.
        name: what they are, for messages.
    """

    costs: np.ndarray
    low: np.ndarray
    high: np.ndarray
    name: str = "adapters"

    def limits(self) -> tuple[int, int]:
        """The least and the most that can be spent."""
        return int(self.costs @ self.low), int(self.costs @ self.high)


def apportion(
    ratios: np.ndarray, order: np.ndarray, slots: Slots, total: int, unit: str = "ranks"
) -> np.ndarray:
    """Whole ranks int [n] costing exactly `total`, as near as they get to the ratios.

    Water-filling gives real ranks. Slots of one price share what those of other prices leave, so
    whole totals per price are found first (they differ from the real ones by as few ranks as the
    budget allows), then largest remainders within a price. Two slots of one price and equal bounds
    keep the order of `order`; equal ones are served from the front.

    Args:
        ratios: positive [n]; the ranks aimed at are proportional to them within the bounds.
        order: [n], rising with `ratios` among slots of one price; settles ties of rounding.

    Raises:
        ConfigError: the budget lies beyond the bounds, or no whole ranks add up to it.
    """
    check_limits(slots, total, unit)
    real = water_fill(ratios, slots, total)
    prices = np.unique(slots.costs)
    members = [slots.costs == price for price in prices]
    totals = _whole_totals(
        prices.tolist(),
        [round(float(real[m].sum())) for m in members],
        [int(slots.low[m].sum()) for m in members],
        [int(slots.high[m].sum()) for m in members],
        total,
    )
    if totals is None:
        raise ConfigError(unreachable(slots, total, unit))
    ranks = np.zeros(len(ratios), np.int64)
    for m, count in zip(members, totals, strict=True):
        low, high = slots.low[m], slots.high[m]
        alike = Slots(np.ones(len(low), np.int64), low, high)
        ranks[m] = _largest_remainder(
            water_fill(ratios[m], alike, count), order[m], low, high, count
        )
    return ranks


def largest_within(values: np.ndarray, costs: np.ndarray, total: int) -> np.ndarray:
    """The largest values that cost exactly `total`, or the most below it that any of them can.

    One threshold for all leaves a rest that no further value fits into. So there is one threshold
    for the values of each price, as few values off the common one as spending the rest takes.

    Args:
        values: [n]; of equal ones the first is taken.
        costs: [n], positive whole numbers.

    Returns:
        bool [n].
    """
    if not len(values):
        return np.zeros(0, bool)
    slots = Slots(costs, np.zeros_like(costs), np.ones_like(costs))
    most, _ = reachable(slots, min(total, int(costs.sum())))
    order = np.argsort(-values, kind="stable")
    common = order[: np.searchsorted(np.cumsum(costs[order]), total, side="right")]
    prices = np.unique(costs)
    counts = _whole_totals(
        prices.tolist(),
        [int((costs[common] == price).sum()) for price in prices],
        [0] * len(prices),
        [int((costs == price).sum()) for price in prices],
        int(most or 0),
    )
    assert counts is not None, "what is reachable has numbers that reach it"
    kept = np.zeros(len(values), bool)
    for price, count in zip(prices, counts, strict=True):
        kept[order[costs[order] == price][:count]] = True
    return kept


def check_limits(slots: Slots, total: int, unit: str = "ranks") -> None:
    """Refuses bounds that contradict each other and a budget below or above what they allow."""
    if (slots.low > slots.high).any():
        i = int((slots.low > slots.high).argmax())
        raise ConfigError(
            f"budget: min_rank {slots.low[i]} is more than the largest rank {slots.high[i]} that "
            "an adapter can have here"
        )
    least, most = slots.limits()
    if not least <= total <= most:
        raise ConfigError(
            f"budget: {total} {unit} lie outside what the bounds allow for {len(slots.costs)} "
            f"{slots.name}: {least} (all at their smallest rank) to {most} (all at their largest)"
        )


def water_fill(ratios: np.ndarray, slots: Slots, total: float) -> np.ndarray:
    """Real ranks [n]: clip(level * ratios, low, high) at the level where they cost `total`.

    The level is exact (a linear equation between two breakpoints), and the map from ratio to rank
    is monotone in floating point too: one product and one clip.
    """
    low, high = slots.low.astype(np.float64), slots.high.astype(np.float64)
    starts, ends = low / ratios, high / ratios
    levels = np.unique(np.concatenate([starts, ends]))

    def cost(level: float) -> float:
        return float(slots.costs @ np.clip(level * ratios, low, high))

    first, last = 0, len(levels) - 1
    while first < last:
        middle = (first + last) // 2
        if cost(levels[middle]) >= total:
            last = middle
        else:
            first = middle + 1
    upper = levels[first]
    lower = levels[first - 1] if first else 0.0
    rising = (starts <= lower) & (ends >= upper) & (low < high)
    level = upper
    if rising.any():
        fixed = np.where(ends <= lower, high, low)[~rising]
        rest = total - float(slots.costs[~rising] @ fixed)
        level = min(max(rest / float(slots.costs[rising] @ ratios[rising]), lower), upper)
    return np.clip(level * ratios, low, high)


def _largest_remainder(
    real: np.ndarray, order: np.ndarray, low: np.ndarray, high: np.ndarray, total: int
) -> np.ndarray:
    """Hamilton's method: floors, then one more rank each to the largest remainders."""
    ranks = np.clip(np.floor(real).astype(np.int64), low, high)
    index = np.arange(len(real))
    # The floors miss the total by less than one rank per slot, but for rounding of `real`.
    while gap := total - int(ranks.sum()):
        sign = 1 if gap > 0 else -1
        open_ = ranks < high if gap > 0 else ranks > low
        ranking = np.lexsort((sign * index, -sign * order, -sign * (real - ranks)))
        ranks[ranking[open_[ranking]][: abs(gap)]] += sign
    return ranks


def _whole_totals(
    prices: list[int], centre: list[int], low: list[int], high: list[int], total: int
) -> list[int] | None:
    """Whole numbers near `centre`, within bounds, with prices @ numbers == total, if there are any.

    A bounded subset sum over the few distinct prices, as bit sets, in a window about `centre` that
    doubles until it holds a solution or everything.
    """
    unit = math.gcd(*prices)
    if total % unit:
        return None
    steps = [price // unit for price in prices]
    width = 0
    while True:
        starts = [max(lo, c - width) for lo, c in zip(low, centre, strict=True)]
        ends = [min(hi, c + width) for hi, c in zip(high, centre, strict=True)]
        spans = [max(e - s, 0) for s, e in zip(starts, ends, strict=True)]
        need = total // unit - sum(s * n for s, n in zip(steps, starts, strict=True))
        if need >= 0:
            sums = _sums(steps, spans, need)
            if sums[0] >> need & 1:
                return _trace(steps, spans, starts, centre, sums, need)
        if starts == low and ends == high:
            return None
        width = max(1, 2 * width)


def _sums(steps: list[int], spans: list[int], limit: int) -> list[int]:
    """Bit i of entry k is set if i is a sum of at most spans[j] of each steps[j], j >= k."""
    mask = (1 << (limit + 1)) - 1
    sums = [1]
    for step, span in zip(reversed(steps), reversed(spans), strict=True):
        bits, chunk = sums[-1], 1
        while span:
            count = min(chunk, span)
            bits = (bits | bits << (step * count)) & mask
            span, chunk = span - count, 2 * chunk
        sums.append(bits)
    return sums[::-1]


def _trace(
    steps: list[int],
    spans: list[int],
    starts: list[int],
    centre: list[int],
    sums: list[int],
    need: int,
) -> list[int]:
    """One solution from the bit sets, each number as near its centre as the later ones allow."""
    numbers = []
    for k, step in enumerate(steps):
        choices = range(min(spans[k], need // step) + 1)
        near = sorted(choices, key=lambda n: (abs(starts[k] + n - centre[k]), n))
        count = next(n for n in near if sums[k + 1] >> (need - step * n) & 1)
        need -= step * count
        numbers.append(starts[k] + count)
    return numbers


def reachable(slots: Slots, total: int) -> tuple[int | None, int | None]:
    """The largest cost at or below `total` and the smallest above it that whole ranks can have."""
    prices = np.unique(slots.costs)
    unit = math.gcd(*prices.tolist())
    steps = (prices // unit).tolist()
    spans = [int((slots.high - slots.low)[slots.costs == price].sum()) for price in prices]
    least, _ = slots.limits()
    need = (total - least) // unit
    # From any sum that is not the largest, one more rank of some price is a sum too.
    bits = _sums(steps, spans, max(need, 0) + max(steps))[0]
    under = bits & ((1 << max(need + 1, 0)) - 1)
    over = bits >> max(need + 1, 0)
    below = least + unit * (under.bit_length() - 1) if under else None
    above = least + unit * (max(need + 1, 0) + (over & -over).bit_length() - 1) if over else None
    return below, above


def unreachable(slots: Slots, total: int, unit: str) -> str:
    """What to say where no whole ranks within the bounds add up to the budget."""
    near = " or ".join(str(value) for value in reachable(slots, total) if value is not None)
    prices = ", ".join(str(price) for price in np.unique(slots.costs))
    return (
        f"budget: no whole ranks within the bounds cost exactly {total} {unit} (one rank of one of "
        f"the {slots.name} costs {prices}); nearest: {near}"
    )

"""Every method spends its budget to the unit or says why not; bounds, order, ties; the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrpo.config import MODULES, ConfigError
from jaxgrpo.study.adalora import budget_at, select, triplet_scores
from jaxgrpo.study.allocate import METHODS, allocate, spent
from jaxgrpo.study.budget import Budget, Slots, apportion, largest_within, reachable, water_fill
from jaxgrpo.study.compress import compress, fold_scales

# Importance by layer in the uniform run of 2605.07366, per cent, read off its figure.
PAPER_SHARES = np.array(
    [
        [3.53, 3.09, 3.37, 3.19, 3.02, 3.49, 3.11, 3.37, 3.61, 3.78, 3.94, 4.29, 4.00, 4.22],
        [4.25, 4.68, 4.65, 4.60, 4.53, 4.17, 3.42, 3.11, 2.65, 2.72, 2.23, 2.30, 2.15, 4.47],
    ]
).ravel()
QWEN_1_5B = {
    "q_proj": (1536, 1536),
    "k_proj": (1536, 256),
    "v_proj": (1536, 256),
    "o_proj": (1536, 1536),
    "gate_proj": (1536, 8960),
    "up_proj": (1536, 8960),
    "down_proj": (8960, 1536),
}
EVERY = settings(max_examples=1000, deadline=None)


@dataclass(frozen=True)
class Case:
    importance: dict
    shapes: dict
    budget: Budget
    seed: int

    @property
    def layers(self):
        return len(next(iter(self.importance.values())))

    def slots(self):
        """(cost, low, high) of each slot, by module then layer, worked out anew."""
        b, rows = self.budget, []
        for module in (m for m in MODULES if m in self.importance):
            shape = self.shapes[module]
            cost = sum(shape) if b.unit == "parameters" else 1
            rows.append((cost, b.min_rank, min(*shape, b.max_rank or math.inf)))
        if b.granularity == "layer":
            rows = [(sum(r[0] for r in rows), b.min_rank, min(r[2] for r in rows))]
        return [row for row in rows for _ in range(self.layers)]

    def in_limits(self, total=None):
        """Whether the bounds alone allow the budget, or another total."""
        rows, total = self.slots(), self.budget.total if total is None else total
        least, most = (sum(row[0] * row[i] for row in rows) for i in (1, 2))
        return least <= total <= most and all(r[1] <= r[2] for r in rows)

    def by_slot(self, by_module):
        """Values of the slots from module -> [L]; one module's stand for its layer."""
        arrays = [by_module[m] for m in MODULES if m in by_module]
        return np.concatenate(arrays[:1] if self.budget.granularity == "layer" else arrays)


def sums_of(rows, limit):
    """Every cost up to `limit` that whole ranks can have: the plain set of sums."""
    sums = {0}
    for cost, low, high in rows:
        steps = [cost * r for r in range(low, high + 1)]
        sums = {s + step for s in sums for step in steps if s + step <= limit}
    return sums


numbers = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0, 2.0, 1e-140, 1e140]),
    st.floats(1e-3, 1e3),
    st.floats(1e-130, 1e130),
)


@st.composite
def cases(draw, ratios=False):
    modules = draw(st.sampled_from([MODULES[:1], MODULES[2:4], MODULES[1:4]]))
    layers = draw(st.integers(1, 5))
    sides = st.sampled_from([2, 3, 4, 6, 8])
    shapes = {m: (draw(sides), draw(sides)) for m in modules}
    if ratios:
        width = draw(st.integers(1, 6))
        rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        # Few distinct values, so that ties are common.
        pick = {m: rng.integers(0, 5, (layers, width)) / 4.0 for m in modules}
        importance = {m: -np.sort(-x, axis=1) for m, x in pick.items()}
    else:
        flat = draw(st.lists(numbers, min_size=3 * layers, max_size=3 * layers))
        rows = np.array(flat).reshape(3, layers)
        importance = {m: rows[i] for i, m in enumerate(modules)}
    low = draw(st.integers(0, 2))
    budget = Budget(
        1,
        unit="ranks" if ratios else draw(st.sampled_from(["ranks", "parameters"])),
        granularity="module" if ratios else draw(st.sampled_from(["layer", "module"])),
        min_rank=low,
        max_rank=draw(st.none() | st.integers(max(low, 1), 8)),
    )
    case = Case(importance, shapes, budget, draw(st.integers(0, 5)))
    rows = case.slots()
    if draw(st.integers(0, 3)):  # a cost that some ranks have
        at = draw(st.lists(st.integers(0, 8), min_size=len(rows), max_size=len(rows)))
        total = sum(
            cost * (low + r % (max(high - low, 0) + 1))
            for r, (cost, low, high) in zip(at, rows, strict=True)
        )
    else:
        total = draw(st.integers(1, 12)) * draw(st.integers(1, 40))
    return replace(case, budget=replace(budget, total=max(total, 1)))


def check(method, case, **options):
    """Ranks of a case, or None where it is refused; a refusal must be warranted."""
    budget = case.budget
    rows = options.pop("rows", None) or case.slots()
    wanted = options.pop("wanted", budget.total)
    call = (method, case.importance, case.shapes, budget)
    try:
        ranks = allocate(*call, seed=case.seed, **options)
    except ConfigError as error:
        message = str(error)
        assert "\n" not in message
        if "every importance is 0" in message:
            assert all((x == 0).all() for x in case.importance.values())
        elif any(low > high for _, low, high in rows):
            assert "min_rank" in message or "outside" in message
        elif "the smallest k" in message:
            assert sum(cost * high for cost, _, high in rows) < budget.total
        else:
            # Otherwise only a budget that no ranks within the bounds can cost is refused.
            sums = sums_of(rows, 4 * budget.total + 200)
            assert budget.total not in sums, message
            least, most = (sum(r[0] * r[i] for r in rows) for i in (1, 2))
            if least <= budget.total <= most:
                below = max(s for s in sums if s < budget.total)
                above = min(s for s in sums if s > budget.total)
                assert message.endswith(f"nearest: {below} or {above}")
            else:
                assert f"{least} (" in message and f"{most} (" in message
        return None
    assert list(ranks) == [m for m in MODULES if m in case.importance]
    assert all(r.dtype == np.int64 and r.shape == (case.layers,) for r in ranks.values())
    assert spent(ranks, case.shapes, budget.unit) == wanted
    if budget.granularity == "layer":
        assert len({tuple(r) for r in ranks.values()}) == 1
    flat = case.by_slot(ranks)
    assert all(low <= r <= high for r, (_, low, high) in zip(flat, rows, strict=True))
    again = allocate(*call, seed=case.seed, **options)
    backwards = dict(reversed(case.importance.items()))
    mirrored = allocate(method, backwards, *call[2:], seed=case.seed, **options)
    for module, r in ranks.items():
        np.testing.assert_array_equal(r, again[module])
        np.testing.assert_array_equal(r, mirrored[module])
    return flat


def check_order(case, ranks, direction, combine="root_sum_square", sizes=None):
    """Of slots with one cost and one upper bound (and one of `sizes`, if given), more importance
    never means fewer ranks."""
    if case.budget.granularity == "layer":
        arrays = np.stack(list(case.importance.values()))
        largest = arrays.max()
        values = arrays.sum(0) if combine == "sum" else np.hypot.reduce(arrays / largest, axis=0)
        slack = 1e-9 if len(arrays) > 1 else 0.0
    else:
        values, slack = case.by_slot(case.importance), 0.0
    rows = np.array(case.slots())
    if sizes is not None:
        rows = np.column_stack([rows, sizes])
    for i in range(len(values)):
        alike = (rows == rows[i]).all(1)
        less = alike & (values * (1 + slack) < values[i])
        assert (direction * (ranks[i] - ranks[less]) >= 0).all()
    return values


@EVERY
@given(cases())
def test_uniform(case):
    ranks = check("uniform", case)
    if ranks is not None:
        rows = np.array(case.slots())
        for row in np.unique(rows, axis=0):
            assert np.ptp(ranks[(rows == row).all(1)]) <= 1


@EVERY
@given(cases(), st.sampled_from(["root_sum_square", "sum"]))
def test_proportional(case, combine):
    ranks = check("proportional", case, combine=combine)
    if ranks is not None:
        check_order(case, ranks, 1, combine)


def test_neighbouring_numbers_keep_their_order():
    """Importances one rounding apart, beside one that is far larger."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        one = rng.uniform(1, 1e4)
        importance = {"k_proj": one, "v_proj": one * 10 ** rng.uniform(3, 15), "o_proj": one}
        importance["o_proj"] = np.nextafter(one, np.inf)
        importance = {module: np.array([value]) for module, value in importance.items()}
        budget = Budget(3, "ranks", 0, None, "module")
        ranks = allocate("proportional", importance, dict.fromkeys(importance, (2, 2)), budget)
        assert {m: int(r[0]) for m, r in ranks.items()} == {"k_proj": 0, "v_proj": 2, "o_proj": 1}


@EVERY
@given(cases())
def test_inverse(case):
    ranks = check("inverse", case)
    if ranks is not None:
        check_order(case, ranks, -1)


@EVERY
@given(cases())
def test_random(case):
    check("random", case)


@EVERY
@given(cases(), st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
def test_reduced(case, fraction):
    rows = case.slots()
    limit = math.floor(round(fraction * case.budget.total, 6))
    sums = sums_of(rows, limit) if case.in_limits(limit) else set()
    if not sums or not any(x.any() for x in case.importance.values()):
        with pytest.raises(ConfigError):
            allocate("reduced", case.importance, case.shapes, case.budget, fraction=fraction)
        return
    ranks = check("reduced", case, fraction=fraction, wanted=max(sums))
    check_order(case, ranks, 1)


@EVERY
@given(cases(), st.integers(1, 5))
def test_top_k(case, k):
    layers, rows = case.layers, case.slots()
    k = 1 + k % (layers + 1)
    if k > layers:
        with pytest.raises(ConfigError, match=rf"1\.\.{layers}|lie outside|min_rank"):
            allocate("top_k", case.importance, case.shapes, case.budget, k=k)
        return
    arrays = np.stack(list(case.importance.values()))
    values = np.hypot.reduce(arrays / (arrays.max() or 1.0), axis=0)
    chosen = sorted(range(layers), key=lambda i: (-values[i], i))[:k]
    bound = [
        (c, low, high if i % layers in chosen or low > high else low)
        for i, (c, low, high) in enumerate(rows)
    ]
    ranks = check("top_k", case, k=k, rows=bound if case.in_limits() else rows)
    if ranks is not None:
        inside = np.array([i % layers in chosen for i in range(len(rows))])
        assert (ranks[~inside] == case.budget.min_rank).all()
        table = np.array(rows)
        for row in np.unique(table, axis=0):
            same = inside & (table == row).all(1)
            assert not same.any() or np.ptp(ranks[same]) <= 1


def _fim_rows(case):
    """FIM's own cap, twice the mean rank, where the budget names none."""
    rows = case.slots()
    if case.budget.max_rank is None:
        mean = case.budget.total / sum(r[0] for r in rows)
        cap = max(math.floor(2 * mean), math.ceil(mean), case.budget.min_rank)
        rows = [(cost, low, min(high, cap)) for cost, low, high in rows]
    return rows


@EVERY
@given(cases())
def test_fim(case):
    ranks = check("fim", case, rows=_fim_rows(case) if case.in_limits() else case.slots())
    if ranks is not None:
        check_order(case, ranks, 1, "sum")


@EVERY
@given(cases())
def test_gora(case):
    ranks = check("gora", case)
    if ranks is not None:
        in_parameters = replace(case, budget=replace(case.budget, unit="parameters"))
        check_order(case, ranks, 1, "sum", [cost for cost, _, _ in in_parameters.slots()])


@EVERY
@given(cases(), st.sampled_from(["constant", "alpha_over_r"]))
def test_equalised(case, scale_rule):
    ranks = check("equalised", case, scale_rule=scale_rule)
    if ranks is not None:
        check_order(case, ranks, -1 if scale_rule == "constant" else 1)


@EVERY
@given(cases(ratios=True), st.sampled_from([1.0, 1.5, 2.0, 4.0]))
def test_eva(case, rho):
    values = np.concatenate(list(case.importance.values()))
    cap = min(round(rho * case.budget.total / len(values)), values.shape[1])
    rows = case.slots()
    if case.in_limits():
        rows = [(cost, low, min(high, cap)) for cost, low, high in rows]
    ranks = check("eva", case, rho=rho, rows=rows)
    if ranks is None:
        return
    # No component left out beats one taken in, bounds apart.
    taken = [values[i, r - 1] for i, r in enumerate(ranks) if r > rows[i][1]]
    left = [values[i, r] for i, r in enumerate(ranks) if r < rows[i][2]]
    assert not taken or not left or min(taken) >= max(left)


def test_every_method_is_tested():
    assert all(f"test_{method}" in globals() for method in METHODS)


# The paper's own numbers (2605.07366): 28 layers, one rank per layer, 896 ranks.


@pytest.mark.parametrize("modules", [MODULES[:1], MODULES])
def test_the_papers_allocations(modules):
    importance = dict.fromkeys(modules, PAPER_SHARES)
    budget = Budget(896 * len(modules), min_rank=20, max_rank=40)
    ranks = allocate("proportional", importance, QWEN_1_5B, budget)["q_proj"]
    assert ranks.sum() == 896 and ranks.min() == 20 and ranks.max() == 40
    # Within rounding and clipping, the share times 896.
    free = (ranks > 20) & (ranks < 40)
    assert np.abs(ranks - PAPER_SHARES / PAPER_SHARES.sum() * 896)[free].max() < 1
    uniform = allocate("uniform", importance, QWEN_1_5B, budget)
    assert all((r == 32).all() for r in uniform.values())
    wide = replace(budget, min_rank=12)
    reduced = allocate("reduced", importance, QWEN_1_5B, wide)["q_proj"]
    assert reduced.sum() == 627 and reduced.min() >= 12 and reduced.max() <= 31
    drawn = allocate("random", importance, QWEN_1_5B, replace(budget, min_rank=16, max_rank=48))
    assert drawn["q_proj"].sum() == 896
    assert drawn["q_proj"].min() >= 16 and drawn["q_proj"].max() <= 48


def test_equal_ranks_are_equal_parameters_per_layer_but_not_per_module():
    importance = {module: PAPER_SHARES * (1 + i) for i, module in enumerate(MODULES)}
    for granularity in ("layer", "module"):
        budget = Budget(36_929_536, "parameters", 1, 64, granularity)
        ranks = allocate("proportional", importance, QWEN_1_5B, budget)
        assert spent(ranks, QWEN_1_5B, "parameters") == 36_929_536
        assert (spent(ranks, QWEN_1_5B) == 6272) == (granularity == "layer")


def budget_of(mean_rank, unit, granularity="module"):
    """What `mean_rank` everywhere costs in 28 layers."""
    each = [sum(shape) if unit == "parameters" else 1 for shape in QWEN_1_5B.values()]
    return Budget(mean_rank * 28 * sum(each), unit, 1, 64, granularity)


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_equal_scores_are_equal_ranks_to_fim_and_equal_parameters_to_gora_under_either_unit(unit):
    """FIM-LoRA shares ranks out, GoRA parameters; what the budget counts is not for it to say."""
    equal = dict.fromkeys(MODULES, np.ones(28))
    fim = allocate("fim", equal, QWEN_1_5B, budget_of(16, unit))
    assert {int(r) for ranks in fim.values() for r in ranks} == {16}
    gora = allocate("gora", equal, QWEN_1_5B, budget_of(16, unit))
    parameters = {m: ranks.mean() * sum(QWEN_1_5B[m]) for m, ranks in gora.items()}
    # What is left are whole ranks: 9 in the MLP under `parameters`, 5 under `ranks`.
    assert max(parameters.values()) / min(parameters.values()) < 1.1
    assert gora["v_proj"].mean() > 5 * gora["up_proj"].mean()


# What equalised promises, and what no rank can do.


@pytest.mark.parametrize(("rule", "exponent"), [("constant", 0.5), ("alpha_over_r", -0.5)])
def test_equalised_flattens_the_predicted_share(rule, exponent):
    budget = Budget(2800, max_rank=1536)
    ranks = allocate("equalised", {"q_proj": PAPER_SHARES}, QWEN_1_5B, budget, scale_rule=rule)[
        "q_proj"
    ]
    share = PAPER_SHARES * ranks**exponent
    assert ranks.sum() == 2800 and share.max() / share.min() < 1.05
    assert PAPER_SHARES.max() / PAPER_SHARES.min() > 2


def test_equalised_refuses_rslora():
    with pytest.raises(ConfigError, match=r"r\^0"):
        allocate("equalised", {"q_proj": PAPER_SHARES}, QWEN_1_5B, Budget(896), scale_rule="rslora")


def test_seeds_differ():
    importance = {"q_proj": PAPER_SHARES}
    first, second = (
        allocate("random", importance, QWEN_1_5B, Budget(896), seed=s)["q_proj"] for s in (0, 1)
    )
    assert (first != second).any()


@pytest.mark.parametrize(
    ("method", "importance", "budget", "options", "message"),
    [
        ("proportinal", {"q_proj": [1.0]}, {}, {}, "did you mean 'proportional'"),
        ("uniform", {}, {}, {}, "no module"),
        ("uniform", {"q_pro": [1.0]}, {}, {}, "did you mean 'q_proj'"),
        ("uniform", {"q_proj": [1.0], "k_proj": [1.0, 2.0]}, {}, {}, r"shape \(2,\)"),
        ("uniform", {"q_proj": [[1.0]]}, {}, {}, r"not \[layers\]"),
        ("uniform", {"q_proj": [np.nan]}, {}, {}, "finite"),
        ("uniform", {"q_proj": [-1.0]}, {}, {}, "not negative"),
        ("uniform", {"q_proj": [1.0]}, {}, {"k": 1}, "takes none"),
        ("top_k", {"q_proj": [1.0]}, {}, {}, "needs the option 'k'"),
        ("top_k", {"q_proj": [1.0]}, {}, {"k": 0}, r"1\.\.1"),
        ("reduced", {"q_proj": [1.0]}, {}, {"fractoin": 0.5}, "did you mean 'fraction'"),
        ("reduced", {"q_proj": [1.0]}, {}, {"fraction": 0.0}, r"\(0, 1\]"),
        ("inverse", {"q_proj": [0.0, 0.0]}, {}, {}, "every importance is 0"),
        ("proportional", {"q_proj": [1.0]}, {}, {"combine": "mean"}, "unknown combine"),
        ("equalised", {"q_proj": [1.0]}, {}, {"scale_rule": "rs_lora"}, "mean 'rslora'"),
        ("eva", {"q_proj": [[1.0]]}, {}, {}, "granularity='module'"),
        ("eva", {"q_proj": [[0.1, 0.2]]}, {"granularity": "module"}, {}, "must fall"),
        ("eva", {"q_proj": [[0.1] * 9]}, {"granularity": "module"}, {"rho": 0.5}, "at least 1"),
        ("uniform", {"q_proj": [1.0]}, {"total": 0}, {}, "at least 1"),
        ("uniform", {"q_proj": [1.0]}, {"total": 1.5}, {}, "whole number"),
        ("uniform", {"q_proj": [1.0]}, {"unit": "rank"}, {}, "did you mean 'ranks'"),
        ("uniform", {"q_proj": [1.0]}, {"granularity": "x"}, {}, "valid: layer, module"),
        ("uniform", {"q_proj": [1.0]}, {"max_rank": 0}, {}, "max_rank must lie"),
        ("uniform", {"q_proj": [1.0]}, {"min_rank": -1}, {}, "min_rank must lie"),
        ("uniform", {"q_proj": [1.0]}, {"min_rank": 2000}, {}, "largest rank 1536"),
        ("uniform", {"q_proj": [1.0] * 3}, {"total": 1}, {}, r"3 \(all at .* to 4608 \("),
    ],
)
def test_mistakes_are_told(method, importance, budget, options, message):
    with pytest.raises(ConfigError, match=message):
        allocate(method, importance, QWEN_1_5B, Budget(**{"total": 8, **budget}), **options)


# The integer core, against plain enumeration.


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_reachable_agrees_with_the_set_of_sums(data):
    n = data.draw(st.integers(1, 4))
    rows = []
    for _ in range(n):
        low = data.draw(st.integers(0, 3))
        rows.append((data.draw(st.integers(1, 30)), low, low + data.draw(st.integers(0, 4))))
    costs, low, high = (np.array(column) for column in zip(*rows, strict=True))
    sums = sorted(sums_of(rows, 10**6))
    total = data.draw(st.integers(sums[0], sums[-1]))
    below, above = reachable(Slots(costs, low, high), total)
    assert below == max(s for s in sums if s <= total)
    assert above == min((s for s in sums if s > total), default=None)
    if total in sums:
        ranks = apportion(np.ones(n), np.zeros(n), Slots(costs, low, high), total)
        assert costs @ ranks == total


def test_water_filling_meets_the_budget_and_keeps_ratios_between_bounds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = 20
        ratios = rng.lognormal(0, 2, n)
        slots = Slots(rng.integers(1, 50, n), rng.integers(0, 5, n), rng.integers(5, 60, n))
        least, most = slots.limits()
        total = int(rng.integers(least, most + 1))
        real = water_fill(ratios, slots, total)
        np.testing.assert_allclose(slots.costs @ real, total, rtol=1e-12)
        free = (real > slots.low) & (real < slots.high)
        if free.any():
            level = (real / ratios)[free]
            np.testing.assert_allclose(level, level[0], rtol=1e-12)
            assert (real[real == slots.low] >= level[0] * ratios[real == slots.low] - 1e-9).all()
            assert (real[real == slots.high] <= level[0] * ratios[real == slots.high] + 1e-9).all()


def test_an_exact_parameter_budget_moves_ranks_by_little():
    costs = np.repeat([3072, 1792, 1792, 3072, 10496, 10496, 10496], 28)
    slots = Slots(costs, np.full(196, 1), np.full(196, 256))
    for seed in range(50):
        rng = np.random.default_rng(seed)
        ratios = rng.lognormal(0, 0.5, 196)
        total = 256 * int(rng.integers(30_000, 200_000))
        ranks = apportion(ratios, ratios, slots, total, "parameters")
        assert costs @ ranks == total
        assert np.abs(ranks - water_fill(ratios, slots, total)).max() < 1.2


def test_order_survives_importances_whose_squares_underflow():
    importance = {"q_proj": np.array([1e-200, 2e-200, 1.0])}
    ranks = allocate("proportional", importance, QWEN_1_5B, Budget(7, max_rank=4))
    assert ranks["q_proj"].tolist() == [1, 2, 4]


def test_a_fraction_is_of_the_decimal_number_written():
    # 0.7 * 90 is 62.99... in float64.
    ranks = allocate("reduced", {"q_proj": np.ones(3)}, QWEN_1_5B, Budget(90), fraction=0.7)
    assert ranks["q_proj"].sum() == 63


# AdaLoRA and PARA where PEFT has no counterpart: ties, limits, refusals.


def test_select_keeps_exactly_the_budget_among_ties():
    scores = {"q_proj": np.ones((2, 3)), "v_proj": np.full((2, 3), 2.0)}
    for budget in range(13):
        masks = select(scores, budget)
        assert sum(int(mask.sum()) for mask in masks.values()) == budget
        assert masks["v_proj"].sum() == min(budget, 6)
    np.testing.assert_array_equal(select(scores, 8)["q_proj"], [[1, 1, 0], [0, 0, 0]])


def test_adalora_refusals():
    scores = {"q_proj": np.ones((2, 3))}
    with pytest.raises(ConfigError, match=r"0\.\.6"):
        select(scores, 7)
    with pytest.raises(ConfigError, match="finite"):
        select({"q_proj": np.array([[np.nan]])}, 1)
    arguments = {"initial": 12, "target": 8, "total_steps": 10, "t_init": 2, "t_final": 3}
    for wrong, message in (
        ({"target": 13}, r"1\.\.12"),
        ({"t_init": 7}, "leave no step"),
        ({"delta_t": 0}, "delta_t"),
    ):
        with pytest.raises(ConfigError, match=message):
            budget_at(0, **{**arguments, **wrong})


def test_triplet_scores_by_hand():
    a = np.array([[[1.0, 2.0], [3.0, 4.0]]])  # [1, in 2, R 2]
    b = np.array([[[1.0, 1.0, 4.0], [0.0, 0.0, 3.0]]])  # [1, R 2, out 3]
    np.testing.assert_allclose(triplet_scores(a, b, np.array([[1.0, 0.5]])), [[5.0, 4.5]])


def _adapter(seed=0):
    rng = np.random.default_rng(seed)
    a, b = {"q_proj": rng.normal(size=(3, 7, 4))}, {"q_proj": rng.normal(size=(3, 4, 6))}
    return a, b, {"q_proj": np.array([4, 2, 0])}, {"q_proj": np.array([2.0, -3.0, 0.0])}


def test_fold_scales_keeps_the_update_under_a_plan_of_other_scales():
    a, b, ranks, scales = _adapter()
    small = compress(a, b, ranks, scales, rank_budget=3)
    kept = small.ranks["q_proj"]
    new = {"q_proj": np.where(kept > 0, 16 / np.sqrt(np.maximum(kept, 1)), 0.0)}
    folded = fold_scales(small.b, scales, new)
    for layer in np.flatnonzero(kept):
        np.testing.assert_allclose(
            new["q_proj"][layer] * small.a["q_proj"][layer] @ folded["q_proj"][layer],
            scales["q_proj"][layer] * small.a["q_proj"][layer] @ small.b["q_proj"][layer],
            atol=1e-12,
        )


def test_a_share_of_the_parameters_is_one_cut_that_fits():
    rng = np.random.default_rng(0)
    shapes = {"q_proj": (10, 10), "down_proj": (40, 10)}  # a rank costs 20, or 50
    a = {m: rng.normal(size=(3, i, 4)) for m, (i, _) in shapes.items()}
    b = {m: rng.normal(size=(3, 4, o)) for m, (_, o) in shapes.items()}
    ranks = {m: np.full(3, 4) for m in shapes}
    scales = {m: np.ones(3) for m in shapes}
    total, costs = 3 * 4 * (20 + 50), {"q_proj": 20, "down_proj": 50}
    values = np.sort(
        np.concatenate(
            [np.linalg.svd(a[m][i] @ b[m][i], compute_uv=False)[:4] for m in a for i in range(3)]
        )
    )[::-1]
    for share in (0.1, 0.25, 0.5, 1.0):
        small = compress(a, b, ranks, scales, parameters=share)
        spent = sum(costs[m] * int(small.ranks[m].sum()) for m in shapes)
        assert spent <= share * total < spent + 50 or (share == 1.0 and spent == total)
        # The largest values of all, and none besides.
        count = sum(int(r.sum()) for r in small.ranks.values())
        assert small.threshold == pytest.approx(values[count - 1])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=9), st.data())
def test_the_largest_within_a_budget_spend_what_can_be_spent(pairs, data):
    """Against every subset: nothing at or below the budget costs more; within a price the largest
    stay; one price alone is a plain cut."""
    values, costs = (np.array(x) for x in zip(*pairs, strict=True))
    total = data.draw(st.integers(0, int(costs.sum())))
    kept = largest_within(values.astype(float), costs, total)
    assert costs[kept].sum() == max(s for s in sums_of([(c, 0, 1) for c in costs], total))
    for price in np.unique(costs):
        same = costs == price
        inside, outside = values[same & kept], values[same & ~kept]
        assert not len(inside) or not len(outside) or inside.min() >= outside.max()
    plain = largest_within(values.astype(float), np.ones_like(costs), len(values) // 2)
    np.testing.assert_array_equal(
        np.flatnonzero(plain), np.sort(np.argsort(-values, kind="stable")[: len(values) // 2])
    )


def test_an_exact_budget_moves_the_common_threshold_by_few_ranks():
    """Qwen2.5-1.5B at twice rank 16, cut to it: against the one threshold that leaves a rest."""
    rng = np.random.default_rng(0)
    costs = np.repeat([3072, 1792, 1792, 3072, 10496, 10496, 10496], 28 * 32)
    total = int(costs.sum()) // 2
    for _ in range(20):
        values = rng.lognormal(0, 1, len(costs))
        kept = largest_within(values, costs, total)
        assert costs[kept].sum() == total
        order = np.argsort(-values)
        common = np.zeros(len(costs), bool)
        common[order[np.cumsum(costs[order]) <= total]] = True
        assert (kept != common).sum() <= 20


OF_COMPRESS = "one of energy, rank_budget, parameters, parameter_budget and per_adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, OF_COMPRESS),
        ({"energy": 0.5, "rank_budget": 1}, OF_COMPRESS),
        ({"energy": 0.5, "parameters": 0.5}, OF_COMPRESS),
        ({"per_adapter": 0}, "per_adapter must be at least 1"),
        ({"parameter_budget": 5}, r"parameter_budget 5 is not in 13\.\.78"),
        ({"parameters": 1.5}, r"parameters must lie in \(0, 1\]"),
        ({"parameters": 0.01}, "not one rank fits into 0.01 of the"),
        ({"energy": 0.0}, r"\(0, 1\]"),
        ({"rank_budget": 7}, r"1\.\.6"),
        ({"energy": 0.5, "b": {"q_proj": np.zeros((3, 4, 6))}}, "every update is zero"),
        ({"energy": 0.5, "ranks": {"q_proj": np.zeros(3, int)}}, "every update is zero"),
        ({"energy": 0.5, "ranks": {"q_proj": np.array([5, 0, 0])}}, r"outside 0\.\.4"),
        ({"energy": 0.5, "ranks": {"q_proj": np.array([1, 0])}}, r"ranks of .*\(2,\)"),
        ({"energy": 0.5, "scales": {"v_proj": np.ones(3)}}, "scales v_proj"),
        ({"energy": 0.5, "scales": {"q_proj": np.full(3, np.inf)}}, "not finite"),
    ],
)
def test_compress_refusals(change, message):
    a, b, ranks, scales = _adapter()
    with pytest.raises(ConfigError, match=message):
        compress(**{"a": a, "b": b, "ranks": ranks, "scales": scales, **change})

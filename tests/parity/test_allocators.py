"""Our allocators against PEFT's own code (AdaLoRA, EVA, conversion) and plain loops, in float64."""

from __future__ import annotations

import math
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import eva as peft_eva
from peft.tuners.lora.conversion import convert_to_lora

from jaxgrpo.config import MODULES
from jaxgrpo.grpo.sensitivity import BETA1, init_sensitivity, update_sensitivity
from jaxgrpo.study.adalora import budget_at, select, triplet_scores
from jaxgrpo.study.allocate import allocate
from jaxgrpo.study.budget import Budget
from jaxgrpo.study.compress import compress

SHAPES = {"q_proj": (6, 8), "v_proj": (6, 4), "down_proj": (10, 6)}
LAYERS = 3


class Layers(torch.nn.Module):
    """Projections named as in a model: layers.<i>.<module>."""

    def __init__(self, shapes, layers=LAYERS):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {m: torch.nn.Linear(*shape, bias=False) for m, shape in shapes.items()}
            )
            for _ in range(layers)
        )


# AdaLoRA: PEFT's RankAllocator, run on its own model with gradients of our choice.


def _adalora_model(seed, **settings):
    torch.manual_seed(seed)
    config = AdaLoraConfig(target_modules=list(SHAPES), **settings)
    model = get_peft_model(Layers(SHAPES), config).double()
    return model, model.base_model.rankallocator


def _peft_key(module, layer):
    return f"base_model.model.layers.{layer}.{module}.lora_E.default"


def _draw(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32)).double()


def _step_both(model, rng):
    """One random gradient on PEFT's P, diag(E), Q at E = 1; ours as (lora, grads) by the same.

    PEFT's gradient of E is given as plain LoRA has it: <a_i, dL/da_i>.
    """
    lora, grads = ({m: {"a": [], "b": []} for m in SHAPES} for _ in "12")
    with torch.no_grad():
        for layer in model.base_model.model.layers:
            for m in SHAPES:
                a, b, e = (getattr(layer[m], f"lora_{x}")["default"] for x in "ABE")
                for ours, theirs in (("a", a), ("b", b)):
                    theirs.copy_(_draw(rng, *theirs.shape))
                    theirs.grad = _draw(rng, *theirs.shape)
                    lora[m][ours].append(theirs.detach().numpy().T.astype(np.float32))
                    grads[m][ours].append(theirs.grad.numpy().T.astype(np.float32))
                e.fill_(1.0)
                e.grad = (a * a.grad).sum(dim=1, keepdim=True)

    def stacked(tree):
        return {
            m: {k: jnp.asarray(np.stack(x)) for k, x in pair.items()} for m, pair in tree.items()
        }

    return stacked(lora), stacked(grads)


def _scores(sensitivity):
    entries = jax.tree.map(np.multiply, sensitivity["mean"], sensitivity["uncertainty"])
    return {m: triplet_scores(x["a"], x["b"], x["e"]) for m, x in entries.items()}


def test_adalora_scores_and_masks_match_pefts_rank_allocator():
    """Our float32 statistics of plain LoRA against PEFT's float64 ones of P diag(E) Q at E = 1.

    Scores to 2e-5: they are float32 sums over few entries. Masks exactly.
    """
    model, allocator = _adalora_model(
        0, init_r=5, target_r=2, tinit=2, tfinal=4, deltaT=2, total_step=16
    )
    rng = np.random.default_rng(1)
    seen = []
    combine = allocator._combine_ipt
    allocator._combine_ipt = lambda e, ab: seen.append(combine(e, ab)) or seen[-1]
    sensitivity, compared = None, 0
    for step in range(1, 16 - 4):
        lora, grads = _step_both(model, rng)
        sensitivity = update_sensitivity(sensitivity or init_sensitivity(lora), lora, grads)
        seen.clear()
        budget, pattern = allocator.update_and_allocate(model, step)
        ours = budget_at(
            step,
            initial=5 * LAYERS * len(SHAPES),
            target=2 * LAYERS * len(SHAPES),
            total_steps=16,
            t_init=2,
            t_final=4,
            delta_t=2,
        )
        assert ours == (budget, pattern is not None)
        if pattern is None:
            continue
        scores = _scores(sensitivity)
        masks = select(scores, budget)
        assert sum(mask.sum() for mask in masks.values()) == budget
        theirs = dict(zip(pattern, seen, strict=True))
        for m in SHAPES:
            for layer in range(LAYERS):
                key = _peft_key(m, layer)
                np.testing.assert_allclose(scores[m][layer], theirs[key].numpy(), rtol=2e-5)
                np.testing.assert_array_equal(masks[m][layer], pattern[key])
        compared += 1
    assert compared >= 4


def test_the_factor_between_a_and_b_has_the_gradient_that_sensitivity_takes_it_to_have():
    """y = x A diag(e) B at e = 1, by autograd: dL/de_i = <a_i, dL/da_i>, float32, rtol 1e-5."""
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 7, 3), "b": (2, 3, 5)}
    lora = {"q_proj": {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}}
    x, target = (jnp.asarray(rng.normal(size=(2, 11, n)), jnp.float32) for n in (7, 5))

    def loss(pair, e):
        y = jnp.einsum("lti,lir,lr,lro->lto", x, pair["a"], e, pair["b"])
        return jnp.sum(jnp.square(y - target)) / 100

    grads, by_e = jax.grad(loss, argnums=(0, 1))(lora["q_proj"], jnp.ones((2, 3)))
    found = update_sensitivity(init_sensitivity(lora), lora, {"q_proj": grads})
    np.testing.assert_allclose(found["mean"]["q_proj"]["e"], (1 - BETA1) * np.abs(by_e), rtol=1e-5)


@pytest.mark.parametrize(("t_init", "t_final", "delta_t"), [(0, 0, 1), (10, 20, 7), (3, 90, 4)])
def test_adalora_budget_schedule_matches_pefts(t_init, t_final, delta_t):
    _, allocator = _adalora_model(
        0, init_r=12, target_r=5, tinit=t_init, tfinal=t_final, deltaT=delta_t, total_step=100
    )
    for step in range(130):
        ours = budget_at(
            step,
            initial=12 * LAYERS * len(SHAPES),
            target=5 * LAYERS * len(SHAPES),
            total_steps=100,
            t_init=t_init,
            t_final=t_final,
            delta_t=delta_t,
        )
        assert ours == allocator.budget_schedule(step)


# EVA: PEFT's redistribution is a function nested in its SVD loop; its code is run as it stands.


def _peft_rank_distribution():
    codes = [
        code
        for code in peft_eva._get_eva_state_dict.__code__.co_consts
        if isinstance(code, types.CodeType) and code.co_name == "_get_rank_distribution"
    ]
    assert len(codes) == 1 and not codes[0].co_freevars
    return types.FunctionType(codes[0], vars(peft_eva))


def _hook(ratios):
    svd = types.SimpleNamespace(explained_variance_ratio_=torch.from_numpy(ratios))
    return types.SimpleNamespace(svd=svd), None


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
def test_eva_matches_pefts_redistribution(rho):
    distribution = _peft_rank_distribution()
    rng = np.random.default_rng(int(rho * 10))
    modules, layers = ("q_proj", "o_proj", "down_proj"), 5
    shapes = dict.fromkeys(modules, (64, 64))
    for _ in range(100):
        rank = int(rng.integers(1, 7))
        width = round(rank * rho)
        ratios = {m: -np.sort(-rng.dirichlet(np.ones(24), layers), axis=1) for m in modules}
        names = {f"layers.{i}.{m}": ratios[m][i] for i in range(layers) for m in modules}
        budget = rank * layers * len(modules)
        theirs = distribution(
            {name: _hook(r) for name, r in names.items()},
            {name: name for name in names},
            {},
            budget,
            dict.fromkeys(names, width),
        )
        ours = allocate(
            "eva",
            ratios,
            shapes,
            Budget(budget, min_rank=0, granularity="module"),
            rho=rho,
        )
        assert {f"layers.{i}.{m}": ours[m][i] for i in range(layers) for m in modules} == theirs


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_under_parameters_is_pefts_pool_until_they_are_used_up(rho):
    """Of equal prices: PEFT's ranks. Of others: the pool largest first, as a loop spends it, but
    for the few ranks that an exact total moves."""
    distribution = _peft_rank_distribution()
    rng = np.random.default_rng(int(rho * 10))
    modules, layers, rank = ("q_proj", "v_proj", "down_proj"), 5, 4
    for _ in range(50):
        ratios = {m: -np.sort(-rng.dirichlet(np.ones(24), layers), axis=1) for m in modules}
        names = {f"layers.{i}.{m}": ratios[m][i] for i in range(layers) for m in modules}
        theirs = distribution(
            {name: _hook(r) for name, r in names.items()},
            {name: name for name in names},
            {},
            rank * len(names),
            dict.fromkeys(names, round(rank * rho)),
        )
        for shapes in (
            dict.fromkeys(modules, (64, 64)),
            {"q_proj": (96, 96), "v_proj": (96, 32), "down_proj": (160, 96)},
        ):
            total = rank * layers * sum(sum(shape) for shape in shapes.values())
            budget = Budget(total, "parameters", 0, None, "module")
            ours = allocate("eva", ratios, shapes, budget, rho=rho)
            assert sum(sum(shapes[m]) * int(r.sum()) for m, r in ours.items()) == total
            if len(set(shapes.values())) == 1:
                assert {f"layers.{i}.{m}": ours[m][i] for i in range(layers) for m in modules} == (
                    theirs
                )
                continue
            pool = sorted(
                ((x, m, i) for m in modules for i in range(layers) for x in ratios[m][i]),
                key=lambda p: -p[0],
            )
            counts, left = Counter(), total
            for _, m, i in pool:
                if counts[m, i] < round(rank * rho):
                    if sum(shapes[m]) > left:
                        break
                    counts[m, i] += 1
                    left -= sum(shapes[m])
            moved = sum(abs(int(ours[m][i]) - counts[m, i]) for m in modules for i in range(layers))
            assert moved <= 6


def test_eva_shares_values_between_modules_of_one_input_as_peft():
    """q, k, v bring equal ratios, so the cut may fall among equals: each input's ranks agree."""
    distribution = _peft_rank_distribution()
    rng = np.random.default_rng(5)
    modules, layers, rank = ("q_proj", "k_proj", "v_proj", "o_proj"), 4, 4
    for _ in range(100):
        shared, own = (-np.sort(-rng.dirichlet(np.ones(16), layers), axis=1) for _ in "12")
        ratios = {"q_proj": shared, "k_proj": shared, "v_proj": shared, "o_proj": own}
        first = {f"{i}.{m}": ratios[m][i] for m in ("q_proj", "o_proj") for i in range(layers)}
        equal = {f"{i}.{m}": f"{i}.q_proj" for m in ("k_proj", "v_proj") for i in range(layers)}
        names = [f"{i}.{m}" for m in modules for i in range(layers)]
        theirs = distribution(
            {name: _hook(r) for name, r in first.items()},
            {**{name: name for name in first}, **equal},
            equal,
            rank * len(names),
            dict.fromkeys(names, 2 * rank),
        )
        ours = allocate(
            "eva",
            ratios,
            dict.fromkeys(modules, (64, 64)),
            Budget(rank * len(names), min_rank=0, granularity="module"),
        )
        for i in range(layers):
            assert ours["o_proj"][i] == theirs[f"{i}.o_proj"]
            assert ours["q_proj"][i] == theirs[f"{i}.q_proj"]
            assert Counter(int(ours[m][i]) for m in ("k_proj", "v_proj")) == Counter(
                theirs[f"{i}.{m}"] for m in ("k_proj", "v_proj")
            )


def test_eva_matches_pefts_whole_initialisation(monkeypatch):
    """PEFT's `get_eva_state_dict` on data; ours on the variance ratios that its SVDs found."""

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleDict({"down_proj": torch.nn.Linear(24, 24)}) for _ in range(4)
            )

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer["down_proj"](x))
            return x

    torch.manual_seed(0)
    hooks = []

    class Recorded(peft_eva.SVDHook):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            hooks.append(self)

    monkeypatch.setattr(peft_eva, "SVDHook", Recorded)
    data = torch.randn(256, 24) @ torch.diag(torch.linspace(3, 0.1, 24))
    rank, rho = 4, 2.0
    state = peft_eva.get_eva_state_dict(
        Chain(),
        [{"x": data}],
        LoraConfig(
            r=rank,
            target_modules=["down_proj"],
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=rho),
        ),
        forward_fn=lambda model, inputs: model(inputs["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    theirs = [state[f"layers.{i}.down_proj"].shape[0] for i in range(4)]
    ratios = np.stack([hook.svd.explained_variance_ratio_.double().numpy() for hook in hooks])
    ours = allocate(
        "eva",
        {"down_proj": ratios},
        {"down_proj": (24, 24)},
        Budget(rank * 4, min_rank=0, granularity="module"),
        rho=rho,
    )
    assert len(set(theirs)) > 1
    assert ours["down_proj"].tolist() == theirs


# PARA: the dense SVD of every update, and PEFT's conversion where one adapter is all there is.


def _trained(seed, shapes=SHAPES, layers=LAYERS, width=4):
    rng = np.random.default_rng(seed)
    a, b, ranks, scales = {}, {}, {}, {}
    for m, (inputs, outputs) in shapes.items():
        a[m] = rng.normal(size=(layers, inputs, width)) * rng.lognormal(0, 1, (layers, 1, width))
        b[m] = rng.normal(size=(layers, width, outputs))
        ranks[m] = rng.integers(0, width + 1, layers)
        scales[m] = rng.uniform(-2, 2, layers)
    ranks[next(iter(shapes))][0] = width
    return a, b, ranks, scales


def _updates(a, b, ranks, scales):
    """(module, layer) -> the full update, by a plain loop over ranks."""
    full = {}
    for m in a:
        for i in range(len(a[m])):
            full[m, i] = np.zeros((a[m].shape[1], b[m].shape[2]))
            for r in range(int(ranks[m][i])):
                full[m, i] += scales[m][i] * np.outer(a[m][i][:, r], b[m][i][r])
    return full


def _dense_para(full, energy=None, rank_budget=None):
    """PARA as published, by the SVD of every full update and one loop over the sorted pool."""
    factors = {key: np.linalg.svd(update) for key, update in full.items()}
    pool = sorted(
        ((s, key) for key, (_, values, _) in factors.items() for s in values), key=lambda p: -p[0]
    )
    total = sum(s * s for s, _ in pool)
    counts, kept = dict.fromkeys(full, 0), 0.0
    for taken, (s, key) in enumerate(pool):
        if (energy is not None and kept >= energy * total) or taken == rank_budget:
            break
        counts[key] += 1
        kept += s * s
    truncated = {
        key: (u[:, : counts[key]] * s[: counts[key]]) @ v[: counts[key]]
        for key, (u, s, v) in factors.items()
    }
    return counts, truncated, kept / total


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_adalora_keeps_pefts_ranks_where_all_cost_the_same_and_the_best_that_fit_elsewhere(unit):
    """Of one price the global top-b, against a sort; of several an exact cost, one threshold per
    price."""
    rng = np.random.default_rng(4)
    costs = {m: sum(shape) if unit == "parameters" else 1 for m, shape in SHAPES.items()}
    for _ in range(50):
        scores = {m: rng.lognormal(0, 1, (LAYERS, 6)) for m in SHAPES}
        budget = 3 * LAYERS * sum(costs.values())
        kept = select(scores, budget, costs)
        assert sum(costs[m] * int(mask.sum()) for m, mask in kept.items()) == budget
        for m, mask in kept.items():
            assert mask.all() or not mask.any() or scores[m][mask].min() > scores[m][~mask].max()
        if unit == "ranks":
            threshold = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[-budget]
            for m, mask in kept.items():
                np.testing.assert_array_equal(mask, scores[m] >= threshold)


@pytest.mark.parametrize("seed", range(10))
def test_para_within_parameters_is_the_dense_svds_largest_values(seed):
    """An exact number of parameters: per price the largest singular values of the full updates."""
    a, b, ranks, scales = _trained(seed)
    costs = {m: sum(shape) for m, shape in SHAPES.items()}
    whole = sum(costs[m] * int(r.sum()) for m, r in ranks.items())
    budget = 2 * max(1, whole // 4)
    ours = compress(a, b, ranks, scales, parameter_budget=budget)
    spent = sum(costs[m] * int(r.sum()) for m, r in ours.ranks.items())
    assert budget - min(costs.values()) < spent <= budget
    full = _updates(a, b, ranks, scales)
    values = {key: np.linalg.svd(update, compute_uv=False) for key, update in full.items()}
    for price in set(costs.values()):
        inside, outside = [0.0], [np.inf]
        for (m, i), s in values.items():
            if costs[m] == price:
                outside += s[: ours.ranks[m][i]].tolist()
                inside += s[ours.ranks[m][i] :].tolist()
        assert max(inside) <= min(outside) * (1 + 1e-9)
    for (m, i), update in full.items():
        u, s, v = np.linalg.svd(update)
        r = ours.ranks[m][i]
        expected = (u[:, :r] * s[:r]) @ v[:r]
        product = scales[m][i] * ours.a[m][i] @ ours.b[m][i]
        np.testing.assert_allclose(product, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "cut", [{"energy": 0.5}, {"energy": 0.9}, {"energy": 0.99}, {"rank_budget": 7}]
)
def test_para_matches_the_dense_svd(seed, cut):
    a, b, ranks, scales = _trained(seed)
    ours = compress(a, b, ranks, scales, **cut)
    counts, truncated, share = _dense_para(_updates(a, b, ranks, scales), **cut)
    if "rank_budget" in cut:
        assert sum(int(r.sum()) for r in ours.ranks.values()) == 7
    np.testing.assert_allclose(ours.energy, share, rtol=1e-12)
    for (m, i), count in counts.items():
        assert ours.ranks[m][i] == count
        product = scales[m][i] * ours.a[m][i] @ ours.b[m][i]
        np.testing.assert_allclose(product, truncated[m, i], atol=1e-12)
        assert not ours.a[m][i][:, count:].any() and not ours.b[m][i][count:].any()


def test_para_reads_masks_as_it_reads_ranks():
    a, b, ranks, scales = _trained(3)
    masks = {m: np.arange(4) < r[:, None] for m, r in ranks.items()}
    one, other = (compress(a, b, use, scales, energy=0.9) for use in (ranks, masks))
    for m in a:
        np.testing.assert_array_equal(one.a[m], other.a[m])
    # A mask with a hole is the adapter without that rank.
    holes = {m: mask.copy() for m, mask in masks.items()}
    holes["q_proj"][0] = [True, False, True, True]
    dropped = {m: x.copy() for m, x in b.items()}
    dropped["q_proj"][0, 1] = 0
    one = compress(a, b, holes, scales, energy=0.9)
    other = compress(a, dropped, ranks, scales, energy=0.9)
    for m in a:
        np.testing.assert_array_equal(one.ranks[m], other.ranks[m])
        np.testing.assert_allclose(one.a[m] @ one.b[m], other.a[m] @ other.b[m], atol=1e-12)


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
def test_para_of_one_adapter_is_pefts_conversion(energy):
    """With one adapter the global cut is the cut per layer that PEFT's `convert_to_lora` makes."""
    shapes = {"q_proj": (9, 12)}
    alpha, width = 6.0, 8
    a, b, _, _ = _trained(7, shapes, layers=1, width=width)
    model = get_peft_model(
        Layers(shapes, 1), LoraConfig(r=width, lora_alpha=alpha, target_modules=["q_proj"])
    )
    layer = model.base_model.model.layers[0]["q_proj"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.from_numpy(a["q_proj"][0].T))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(b["q_proj"][0].T))
    with pytest.warns(UserWarning, match="already a LoRA"):
        config, state = convert_to_lora(model, rank=energy)
    scale = alpha / width
    ours = compress(
        a, b, {"q_proj": np.array([width])}, {"q_proj": np.array([scale])}, energy=energy
    )
    (theirs_a,) = (x.double().numpy() for name, x in state.items() if "lora_A" in name)
    (theirs_b,) = (x.double().numpy() for name, x in state.items() if "lora_B" in name)
    rank = ours.ranks["q_proj"][0]
    assert rank == theirs_a.shape[0] == config.rank_pattern.get("layers.0.q_proj", 1)
    np.testing.assert_allclose(
        scale * ours.a["q_proj"][0] @ ours.b["q_proj"][0], (theirs_b @ theirs_a).T, atol=2e-5
    )


# FIM-LoRA and GoRA: loops after the papers' texts.


def _fim_reference(scores, rank, rank_max):
    """FIM-LoRA's budget loop without a minimum: freeze at the cap, then largest remainders."""
    budget, free = rank * len(scores), list(range(len(scores)))
    ranks = [0] * len(scores)
    while True:
        rest = sum(scores[i] for i in free)
        shares = {i: scores[i] / rest * budget for i in free}
        full = [i for i in free if math.floor(shares[i]) >= rank_max]
        if not full:
            break
        for i in full:
            ranks[i] = rank_max
            budget -= rank_max
            free.remove(i)
    for i in free:
        ranks[i] = math.floor(shares[i])
    left = budget - sum(ranks[i] for i in free)
    for i in sorted(free, key=lambda i: -(shares[i] - math.floor(shares[i])))[:left]:
        ranks[i] += 1
    return ranks


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_fim_matches_its_loop_where_no_minimum_binds(rank):
    rng = np.random.default_rng(rank)
    modules, layers = ("q_proj", "v_proj", "down_proj"), 8
    shapes = dict.fromkeys(modules, (64, 64))
    capped = 0
    for _ in range(200):
        gradients = {m: rng.normal(size=(layers, 5, 6, 4)) for m in modules}  # batches of B's
        spread = {m: rng.lognormal(0, 1.5, (layers, 1, 1, 1)) for m in modules}
        scores = {m: ((gradients[m] * spread[m]) ** 2).mean(axis=(1, 2, 3)) for m in modules}
        ours = allocate(
            "fim",
            scores,
            shapes,
            Budget(rank * layers * len(modules), min_rank=0, granularity="module"),
        )
        flat = np.concatenate([scores[m] for m in modules]).tolist()
        theirs = _fim_reference(flat, rank, 2 * rank)
        capped += theirs.count(2 * rank)
        np.testing.assert_array_equal(np.concatenate([ours[m] for m in modules]), theirs)
    assert capped > 100


def _fim_published_minimum(ranks, scores, rank_min, rank_max):
    """The authors' repair after the fact: lift to the minimum, paid for by unsaturated others."""
    ranks = list(ranks)
    for i in range(len(ranks)):
        while ranks[i] < rank_min:
            ranks[i] += 1
            donors = [j for j in range(len(ranks)) if rank_min < ranks[j] < rank_max]
            if donors:
                ranks[min(donors, key=lambda j: scores[j])] -= 1
    return ranks


def test_fim_keeps_the_budget_where_the_published_minimum_overspends():
    rng = np.random.default_rng(0)
    layers, rank = 28, 8
    scores = {m: rng.lognormal(0, 1.5, layers) for m in MODULES}
    flat = np.concatenate([scores[m] for m in MODULES]).tolist()
    budget = rank * len(flat)
    published = _fim_published_minimum(_fim_reference(flat, rank, 16), flat, rank, 16)
    assert sum(published) > 1.1 * budget
    for minimum in (1, 4, 8):
        ours = allocate(
            "fim",
            scores,
            dict.fromkeys(MODULES, (64, 64)),
            Budget(budget, min_rank=minimum, granularity="module"),
        )
        assert sum(int(r.sum()) for r in ours.values()) == budget
        assert min(int(r.min()) for r in ours.values()) >= minimum


def _fim_reference_with_minimum(scores, budget, low, high):
    """clip(level * score, low, high) at the level that spends the budget, found by bisection."""
    below, above = 0.0, high / min(scores)
    for _ in range(200):
        level = (below + above) / 2
        total = sum(min(max(level * s, low), high) for s in scores)
        below, above = (level, above) if total < budget else (below, level)
    real = [min(max(above * s, low), high) for s in scores]
    ranks = [math.floor(x) for x in real]
    order = sorted(range(len(real)), key=lambda i: ranks[i] - real[i])
    for i in order[: budget - sum(ranks)]:
        ranks[i] += 1
    return ranks


@pytest.mark.parametrize("low", [1, 3, 6])
def test_fim_with_a_minimum_matches_a_bisection(low):
    rng = np.random.default_rng(low)
    modules, layers, rank = ("q_proj", "v_proj"), 9, 6
    for _ in range(100):
        scores = {m: rng.lognormal(0, 1.5, layers) for m in modules}
        budget = rank * layers * len(modules)
        ours = allocate(
            "fim",
            scores,
            dict.fromkeys(modules, (64, 64)),
            Budget(budget, min_rank=low, granularity="module"),
        )
        flat = np.concatenate([scores[m] for m in modules]).tolist()
        theirs = _fim_reference_with_minimum(flat, budget, low, 2 * rank)
        np.testing.assert_array_equal(np.concatenate([ours[m] for m in modules]), theirs)


def _level_reference(ratios, costs, budget, low, high):
    """Real ranks clip(level * ratio, low, high) that cost the budget, the level by bisection."""
    below, above = 0.0, high / min(ratios)
    for _ in range(200):
        level = (below + above) / 2
        real = [min(max(level * ratio, low), high) for ratio in ratios]
        cost = sum(c * r for c, r in zip(costs, real, strict=True))
        below, above = (level, above) if cost < budget else (below, level)
    return [min(max(above * ratio, low), high) for ratio in ratios]


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
@pytest.mark.parametrize("method", ["fim", "gora"])
def test_fim_and_gora_keep_their_own_formula_under_either_unit(method, unit):
    """rank ~ score (FIM-LoRA) and rank ~ score / (in + out) (GoRA): against a bisection, to the
    rounding that whole ranks and an exact budget take (measured: at most 1.2 ranks)."""
    rng = np.random.default_rng(2)
    shapes = {m: (64 * inputs, 64 * outputs) for m, (inputs, outputs) in SHAPES.items()}
    sizes = np.repeat([float(sum(shape)) for shape in shapes.values()], LAYERS)
    for _ in range(100):
        scores = {m: rng.lognormal(0, 0.7, LAYERS) for m in shapes}
        costs = sizes if unit == "parameters" else np.ones(len(sizes))
        total = 24 * int(costs.sum())
        ours = allocate(method, scores, shapes, Budget(total, unit, 2, 64, "module"))
        flat = np.concatenate([ours[m] for m in shapes])
        assert int(costs @ flat) == total
        ratios = np.concatenate([scores[m] for m in shapes]) / (sizes if method == "gora" else 1)
        theirs = _level_reference(ratios.tolist(), costs.tolist(), total, 2, 64)
        assert np.abs(flat - theirs).max() < 1.5


def _gora_reference(weights, gradients, budget, low, high):
    """GoRA's published ranks: each floored and clipped on its own, whatever that spends."""
    means = {key: np.abs(w * gradients[key]).mean() for key, w in weights.items()}
    total = sum(means.values())
    ranks = {}
    for key, mean in means.items():
        cost = sum(weights[key].shape)
        ranks[key] = min(max(round(mean / total * budget) // cost, low), high)
    return ranks


def test_gora_matches_its_formula_up_to_what_conserving_the_budget_takes():
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights = {(m, i): rng.normal(size=s) for m, s in SHAPES.items() for i in range(LAYERS)}
        gradients = {
            k: rng.normal(size=w.shape) * rng.lognormal(0, 0.3) for k, w in weights.items()
        }
        importance = {
            m: np.array([np.abs(weights[m, i] * gradients[m, i]).mean() for i in range(LAYERS)])
            for m in SHAPES
        }
        budget = 100 * LAYERS * sum(sum(s) for s in SHAPES.values())
        wide = {m: (inputs * 100, outputs * 100) for m, (inputs, outputs) in SHAPES.items()}
        # The same model a hundred times as wide: ranks of about 100, of which rounding is a part.
        published = _gora_reference(weights, gradients, budget, 1, 400)
        ours = allocate(
            "gora", importance, wide, Budget(budget * 100, "parameters", 1, 400, "module")
        )
        spent = sum(sum(wide[m]) * int(r) for m, row in ours.items() for r in row)
        assert spent == budget * 100
        difference = [int(ours[m][i]) - published[m, i] for m, i in weights]
        # Flooring alone leaves half a rank each; a shift by one more pays for the exact total.
        assert min(difference) >= -1 and max(difference) <= 2


def test_gora_is_its_formula_where_that_spends_the_budget():
    rng = np.random.default_rng(1)
    for _ in range(100):
        ranks = {m: rng.integers(4, 33, LAYERS) for m in SHAPES}
        wide = {m: (64 * inputs, 64 * outputs) for m, (inputs, outputs) in SHAPES.items()}
        # Importances whose shares of the parameters are whole ranks.
        importance = {m: r * float(sum(wide[m])) for m, r in ranks.items()}
        budget = sum(int(r.sum()) * sum(wide[m]) for m, r in ranks.items())
        ours = allocate("gora", importance, wide, Budget(budget, "parameters", 4, 32, "module"))
        for m in SHAPES:
            np.testing.assert_array_equal(ours[m], ranks[m])

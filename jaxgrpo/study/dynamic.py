"""Plans that move: AdaLoRA's pruning, re-profiling every K steps, PARA's cut after the last step.

Both only change masks, so nothing recompiles. Ranks that stay keep their values and what they add
to the output; ranks that leave are zeroed; ranks that are born add zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrpo.config import Config
from jaxgrpo.loop import Replan
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.study.adalora import budget_at, select, triplet_scores
from jaxgrpo.study.allocate import allocate
from jaxgrpo.study.budget import Budget, Slots, reachable
from jaxgrpo.study.compress import compress, fold_scales
from jaxgrpo.study.config import Arm, StudyConfig
from jaxgrpo.types import TrainState, Tree


def make_replan(
    config: StudyConfig, arm: Arm, run: Config, shapes: Mapping[str, tuple[int, int]]
) -> Replan:
    """What `train_session` asks after every step of an arm whose plan is in DYNAMIC."""
    allocation = config.study.allocation
    costs = {m: sum(shapes[m]) if allocation.unit == "parameters" else 1 for m in shapes}
    if arm.plan == "adalora":
        return adalora_replan(run.steps, arm.mean_rank, costs)
    if arm.plan == "para":
        return para_replan(run.steps, arm.mean_rank, costs)
    if arm.plan == "uniform_cut":
        return uniform_cut_replan(run.steps, arm.mean_rank)
    low, high = config.bounds(arm.mean_rank, arm.plan)
    return adaptive_replan(
        Path(run.run_dir) / "layer_grad_norms.jsonl",
        allocation.adaptive_every_steps,
        run.steps,
        shapes,
        {
            "unit": allocation.unit,
            "granularity": allocation.granularity,
            "min_rank": low,
            "max_rank": high,
        },
    )


def cost_of(plan: RankPlan, costs: Mapping[str, int]) -> int:
    """What a plan's ranks cost, from what a rank of each module costs."""
    return int(sum(ranks.sum() * costs[module] for module, ranks in plan.ranks.items()))


def at_rank(plan: RankPlan, rank: int) -> RankPlan:
    """The same adapters with one rank everywhere."""
    return dataclasses.replace(plan, ranks={m: np.full(plan.layers, rank) for m in plan.modules})


def adalora_replan(steps: int, target_rank: int, costs: Mapping[str, int]) -> Replan:
    """AdaLoRA (arXiv 2303.10512): from the plan at the start down to target_rank on average.

    Ranks are chosen by sensitivity x uncertainty (`grpo/sensitivity.py`), ten times on the cubic
    schedule between a tenth and seven tenths of the run: the scores of a rank's column of A and row
    of B, each as a mean, and of the factor between them.

    Args:
        costs: module -> what a rank costs: 1 as published, or its parameters.
    """

    def replan(done: int, state: TrainState, plan: RankPlan) -> tuple[TrainState, RankPlan] | None:
        # The start is uniform at the plan's reference times 1.5, capped by the width.
        initial = min(-(-3 * target_rank // 2), plan.max_rank)
        target = cost_of(at_rank(plan, target_rank), costs)
        budget, chosen = budget_at(
            done,
            initial=cost_of(at_rank(plan, initial), costs),
            target=target,
            total_steps=steps,
            t_init=steps // 10,
            t_final=max(3 * steps // 10, 1),
            delta_t=max(6 * steps // 100, 1),
        )
        if not chosen or cost_of(plan, costs) <= budget:
            return None
        assert state.sensitivity is not None
        scores = rank_scores(state.sensitivity, plan)
        kept = select(scores, budget, costs)
        ranks = {module: mask.sum(axis=1) for module, mask in kept.items()}
        moved = dataclasses.replace(plan, ranks=ranks)
        if not _reaches(moved, costs, target):
            return None  # no ranks of those left would cost the target: the next cut may do better
        return move_ranks(state, plan, moved, scores), moved

    return replan


def _reaches(plan: RankPlan, costs: Mapping[str, int], total: int) -> bool:
    """Whether some of a plan's ranks cost exactly `total`."""
    prices = np.concatenate([np.full(plan.layers, costs[m]) for m in plan.modules])
    ranks = np.concatenate([plan.ranks[m] for m in plan.modules])
    return reachable(Slots(prices, np.zeros_like(ranks), ranks), total)[0] == total


def adaptive_replan(
    norms: Path,
    every: int,
    steps: int,
    shapes: Mapping[str, tuple[int, int]],
    bounds: dict[str, Any],
) -> Replan:
    """Every `every` steps but the last: ranks in proportion to the rank-free norms since, unless
    all of them are 0.

    The raw norm would follow the ranks themselves (it grows as scale x sqrt(rank)), so that every
    round would confirm the one before; the rank-free view takes that factor out.
    """

    def replan(done: int, state: TrainState, plan: RankPlan) -> tuple[TrainState, RankPlan] | None:
        if done % every or done == steps:
            return None
        seen = [r["rank_free"] for r in read_jsonl(norms) if done - every < r["step"] <= done]
        importance = {
            module: np.sum(
                [np.hypot(record[module]["a"], record[module]["b"]) for record in seen], axis=0
            )
            for module in plan.modules
        }
        if not any(values.any() for values in importance.values()):
            return None  # no gradient since, nothing to move ranks by
        cost = {m: sum(shapes[m]) if bounds["unit"] == "parameters" else 1 for m in plan.modules}
        total = sum(int(plan.ranks[m].sum()) * cost[m] for m in plan.modules)
        ranks = allocate("proportional", importance, shapes, Budget(total=total, **bounds))
        moved = dataclasses.replace(plan, ranks=ranks)
        return move_ranks(state, plan, moved, rank_sizes(state.lora, plan)), moved

    return replan


def para_replan(steps: int, target_rank: int, costs: Mapping[str, int]) -> Replan:
    """PARA (arXiv 2604.27796): trained at the uniform start rank, cut once after the last step.

    The largest singular values of all updates together stay, at the cost of target_rank everywhere;
    nothing is trained after the cut, so that rank is the only thing it changes.
    """
    unit = "rank_budget" if set(costs.values()) == {1} else "parameter_budget"

    def replan(done: int, state: TrainState, plan: RankPlan) -> tuple[TrainState, RankPlan] | None:
        budget = cost_of(at_rank(plan, target_rank), costs)
        if done != steps or cost_of(plan, costs) <= budget:
            return None
        return _cut(state, plan, {unit: budget})

    return replan


def uniform_cut_replan(steps: int, target_rank: int) -> Replan:
    """PARA's control: trained as wide, cut as late, to the target_rank largest of every adapter."""

    def replan(done: int, state: TrainState, plan: RankPlan) -> tuple[TrainState, RankPlan] | None:
        if done != steps or plan.total_rank <= target_rank * plan.num_adapters:
            return None
        return _cut(state, plan, {"per_adapter": target_rank})

    return replan


def _cut(
    state: TrainState, plan: RankPlan, amount: Mapping[str, Any]
) -> tuple[TrainState, RankPlan]:
    after, moved = cut_adapter(jax.device_get(state.lora), plan, amount)
    placed = jax.tree.map(
        lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding), after, state.lora
    )
    return dataclasses.replace(state, lora=placed), moved


def cut_adapter(lora: Tree, plan: RankPlan, amount: Mapping[str, Any]) -> tuple[Tree, RankPlan]:
    """An adapter on the host and its plan after `compress`, under the new ranks' own scales."""
    a, b = ({m: np.asarray(pair[side]) for m, pair in lora.items()} for side in ("a", "b"))
    cut = compress(a, b, plan.ranks, plan.scales(), **amount)
    moved = dataclasses.replace(plan, ranks=cut.ranks)
    folded = fold_scales(cut.b, plan.scales(), moved.scales())
    return {m: {"a": cut.a[m], "b": folded[m]} for m in plan.modules}, moved


def rank_scores(sensitivity: Tree, plan: RankPlan) -> dict[str, np.ndarray]:
    """AdaLoRA's score of every rank, module -> [L, R]; ranks off the plan score -1, below any."""
    entries = jax.device_get(
        jax.tree.map(jnp.multiply, sensitivity["mean"], sensitivity["uncertainty"])
    )
    masks = plan.masks()
    return {
        module: np.where(masks[module] > 0, triplet_scores(pair["a"], pair["b"], pair["e"]), -1.0)
        for module, pair in entries.items()
    }


def rank_sizes(lora: Tree, plan: RankPlan) -> dict[str, np.ndarray]:
    """How much each rank adds to the output, ||a_i|| ||b_i||: [L, R]; -1 off the plan."""
    masks = plan.masks()
    sizes = jax.device_get(
        {
            m: jnp.linalg.norm(pair["a"], axis=1) * jnp.linalg.norm(pair["b"], axis=2)
            for m, pair in lora.items()
        }
    )
    return {m: np.where(masks[m] > 0, size, -1.0) for m, size in sizes.items()}


def move_ranks(
    state: TrainState, old: RankPlan, new: RankPlan, scores: dict[str, np.ndarray]
) -> TrainState:
    """The state under another plan: the best ranks by `scores` first, as a plan's masks want them.

    B is rescaled where the scale rule gives the new rank another scale, so that the ranks that stay
    add what they did; its moments are rescaled as its gradient is. Ranks that leave are zeroed, but
    for A. A newborn rank starts with B = 0, a first moment of 0 and the mean second moment of its
    adapter: Adam's step count goes on, and with a second moment of 0 too, its first updates would
    be several times those of an old rank.
    """
    moves = {module: _move(old, new, module, scores[module]) for module in old.modules}

    def placed(tree: Tree, like: Tree) -> Tree:
        # Back to where the old arrays were: another placement would compile another program.
        return jax.tree.map(
            lambda x, old: jax.device_put(x.astype(old.dtype), old.sharding), tree, like
        )

    def arrange(tree: Tree, power: int = 0, born: bool = False) -> Tree:
        """Zero off the new ranks, b times ratio**power; newborns get the mean if `born`."""
        found = {
            module: {
                name: moves[module].arrange(name, leaf, power, born)
                for name, leaf in leaves.items()
            }
            for module, leaves in tree.items()
        }
        return placed(found, tree)

    def moments(node: Any) -> Any:
        if not isinstance(node, optax.ScaleByAdamState):
            return node
        return node._replace(
            mu=arrange(cast(Tree, node.mu), power=-1),
            nu=arrange(cast(Tree, node.nu), power=-2, born=True),
        )

    # A is kept everywhere: what is off the plan is what a rank that is born starts from.
    lora = {
        module: {
            "a": move.reorder("a", state.lora[module]["a"]),
            "b": move.arrange("b", state.lora[module]["b"], power=1, born=False),
        }
        for module, move in moves.items()
    }
    return dataclasses.replace(
        state,
        lora=placed(lora, state.lora),
        opt_state=jax.tree.map(
            moments,
            state.opt_state,
            is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState),
        ),
        sensitivity=None
        if state.sensitivity is None
        else {name: arrange(tree) for name, tree in state.sensitivity.items()},
    )


_RANK_AXIS = {"a": 2, "b": 1, "e": 1}
"""Where the ranks are in a leaf of an adapter, its moments or its sensitivity."""


@dataclass(frozen=True)
class _Move:
    """What happens to the ranks of one module.

    Attributes:
        order: [L, R], the old place of every rank.
        used: [L, R], whether a place was on the old plan, by the old places.
        kept, born: [L, R], which places hold an old rank, or a new one.
        ratio: [L], old over new scale.
    """

    order: np.ndarray
    used: np.ndarray
    kept: np.ndarray
    born: np.ndarray
    ratio: np.ndarray

    def reorder(self, name: str, leaf: jax.Array) -> jax.Array:
        return jnp.take_along_axis(leaf, _spread(self.order, name, leaf), axis=_RANK_AXIS[name])

    def arrange(self, name: str, leaf: jax.Array, power: int, born: bool) -> jax.Array:
        moved = self.reorder(name, leaf) * _spread(self.kept, name, leaf)
        if born:
            moved = moved + self.mean(name, leaf) * _spread(self.born, name, leaf)
        if name == "b":
            moved = moved * jnp.asarray(self.ratio**power)[:, None, None]
        return moved

    def mean(self, name: str, leaf: jax.Array) -> jax.Array:
        """Over the ranks that an adapter had; where it had none, over those of its module."""
        axis = _RANK_AXIS[name]
        total = jnp.sum(leaf * _spread(self.used, name, leaf), axis=axis, keepdims=True)
        count = self.used.sum(axis=1)
        own = total / _spread(np.maximum(count, 1)[:, None], name, leaf)
        others = total.sum(axis=0, keepdims=True) / max(int(count.sum()), 1)
        return jnp.where(_spread(count[:, None] > 0, name, leaf), own, others)


def _move(old: RankPlan, new: RankPlan, module: str, scores: np.ndarray) -> _Move:
    places = np.arange(old.max_rank)
    before, after = old.ranks[module][:, None], new.ranks[module][:, None]
    was, now = (plan.scales()[module] for plan in (old, new))
    ratio = np.where((was > 0) & (now > 0), was / np.where(now > 0, now, 1), 1.0)
    return _Move(
        order=np.argsort(-scores, axis=1, kind="stable"),
        used=places < before,
        kept=places < np.minimum(before, after),
        born=(places >= before) & (places < after),
        ratio=ratio.astype(np.float32),
    )


def _spread(ranks: np.ndarray, name: str, leaf: jax.Array) -> jax.Array:
    """[L, R] with the leaf's other axis, so that the two broadcast."""
    axes = {"a": (slice(None), None), "b": (slice(None), slice(None), None)}
    return jnp.asarray(ranks if leaf.ndim == 2 else ranks[axes[name]])

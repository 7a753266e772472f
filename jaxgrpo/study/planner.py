"""From a study's configuration and what it measured to the ranks of every plan. No jax."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from jaxgrpo.config import ConfigError
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.study.allocate import allocate
from jaxgrpo.study.budget import Budget, Granularity
from jaxgrpo.study.config import (
    Arm,
    StudyConfig,
    StudyFiles,
    list_arms,
    scaled_lora,
)
from jaxgrpo.study.norms import first_order_speed, importance, no_gradient, read_norms
from jaxgrpo.study.runs import has_plan_file, read_profile_model
from jaxgrpo.study.sections import BY_MODULE, FROM_CALIBRATION, FROM_PROFILE, SCALE_RULES, WIDE

PROBE_SEED = 1000
"""Of the order in which layers take the probes' rank levels; arms draw theirs from 0 on."""


class Planner:
    """Makes the plans of a study's arms."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.files = StudyFiles(config.run_dir)

    def check(self) -> None:
        """Refuses what no importance can turn into ranks, before anything is measured.

        Budget and bounds say all, and they follow from the model's config.json.
        """
        for arm in list_arms(self.config):
            if has_plan_file(arm):
                components = (self.config.width(arm.mean_rank),) if arm.plan == "eva" else ()
                level = {m: np.ones((self.layers, *components)) for m in self.modules}
                self.allocate(arm, level)

    @cached_property
    def model(self) -> dict:
        """Layers and module shapes: as the profile's run recorded them, or from config.json."""
        if found := read_profile_model(self.config):
            return found
        from jaxgrpo.model.weights import read_qwen_config, resolve_model_dir

        settings = self.config.model
        directory = resolve_model_dir(settings.path, settings.revision, ["config.json"])
        model = read_qwen_config(directory, "float32")
        return {"layers": model.num_layers, "module_shapes": model.module_shapes}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """module -> (in, out)."""
        return {m: tuple(s) for m, s in self.model["module_shapes"].items()}  # type: ignore[misc]

    @property
    def layers(self) -> int:
        return self.model["layers"]

    @property
    def modules(self) -> tuple[str, ...]:
        return self.config.lora.target_modules

    def budget(self, mean_rank: int, granularity: Granularity, plan: str | None = None) -> Budget:
        """What mean_rank everywhere costs, within the bounds of a plan."""
        unit = self.config.study.allocation.unit
        low, high = self.config.bounds(mean_rank, plan)
        each = [sum(self.shapes[m]) if unit == "parameters" else 1 for m in self.modules]
        return Budget(
            total=mean_rank * self.layers * sum(each),
            unit=unit,
            min_rank=low,
            max_rank=high,
            granularity=granularity,
        )

    def importance(self, arm: Arm) -> dict[str, np.ndarray]:
        """What an arm's plan is made from: module -> [L], for eva [L, components]."""
        objective = self.config.importance_objective(arm.objective)
        if arm.plan in FROM_CALIBRATION:
            path = self.files.calibration(objective)
            raw = json.loads(path.read_text(encoding="utf-8"))[arm.plan]
            return {module: np.asarray(v) for module, v in raw.items()}
        if arm.plan in (*FROM_PROFILE, "ranks_only", "speeds_only"):
            view = "weight" if arm.plan == "equalised" else self.config.study.allocation.view
            norms = read_norms(self.files.profile(objective), view)
            assert norms is not None, f"the profile has no view {view}"
            if cause := no_gradient(self.files.profile(objective)):
                raise ConfigError(f"plan {arm.plan} has nothing to go by: {cause}")
            return importance(norms)
        return {m: np.ones(self.layers) for m in self.modules}

    def probes(self) -> list[dict[str, np.ndarray]]:
        """Ranks of every draw, those by layer last. Layers in an order drawn for each module (for
        those by layer, once) have the levels in turn, and go on to another one in every draw."""
        probe, rank = self.config.study.probe, self.config.lora.rank
        rng, width = np.random.default_rng(PROBE_SEED), self.config.width(rank)
        places = {module: rng.permutation(self.layers) for module in self.modules}
        together = rng.permutation(self.layers)
        levels = {
            m: np.clip([rank // 4, rank // 2, rank, 2 * rank], 1, min(width, *self.shapes[m]))
            for m in self.modules
        }
        apart = [{m: levels[m][(places[m] + d) % 4] for m in levels} for d in range(probe.draws)]
        # By two levels first: each layer is once above and once below.
        shifts = [2 * d + d // 2 for d in range(probe.layer_draws)]
        return apart + [{m: levels[m][(together + by) % 4] for m in levels} for by in shifts]

    def start(self, arm: Arm) -> int:
        """The rank everywhere that a plan in WIDE starts at; adalora's as in PEFT, 12 to 8."""
        start = -(-3 * arm.mean_rank // 2) if arm.plan == "adalora" else 2 * arm.mean_rank
        return min(start, self.config.width(arm.mean_rank))

    def allocate(self, arm: Arm, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ranks of one arm from its importance."""
        settings, plan = self.config.study.allocation, arm.plan
        if plan == "speeds_only":
            return {m: np.full(self.layers, arm.mean_rank) for m in self.modules}
        if plan in WIDE:
            return {m: np.full(self.layers, self.start(arm)) for m in self.modules}
        granularity = "module" if plan in BY_MODULE else settings.granularity
        budget = self.budget(arm.mean_rank, granularity, plan)
        options: dict[str, Any] = {}
        if plan == "top_k":
            options["k"] = settings.top_layers
        elif plan == "reduced":
            options["fraction"] = settings.reduced_fraction
        elif plan == "equalised":
            options["scale_rule"] = arm.scale_rule
        method = "proportional" if plan in ("proportional_module", "ranks_only") else plan
        try:
            return allocate(method, values, self.shapes, budget, seed=arm.seed, **options)
        except ConfigError as error:
            where = " (k is study.allocation.top_layers)" if plan == "top_k" else ""
            raise ConfigError(f"plan {plan} at mean rank {arm.mean_rank}{where}: {error}") from None

    def scales(self, arm: Arm, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Factors on the scales of cell D: its layers learn at the speeds that P's ranks give."""
        if arm.plan != "speeds_only":
            return None
        proportional = dataclasses.replace(arm, plan="proportional")
        ranks = self.allocate(proportional, values)
        return {m: r / arm.mean_rank for m, r in ranks.items()}

    def speeds(
        self,
        arm: Arm,
        ranks: Mapping[str, np.ndarray],
        scales: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, float]:
        """First-order speed of a plan under every scale rule, by the weights' own gradient; none
        where there was no gradient."""
        objective = self.config.importance_objective(arm.objective)
        norms = read_norms(self.files.profile(objective), "weight")
        assert norms is not None, "every profile has the view weight"
        found: dict[str, float] = {}
        if no_gradient(self.files.profile(objective)):
            return found
        for rule in SCALE_RULES:
            settings = scaled_lora(self.config, rule, arm.mean_rank)
            lora = dataclasses.replace(self.config.lora, **settings)
            plan = make_rank_plan(lora, self.layers, ranks)
            plan = dataclasses.replace(plan, scale_factors=scales)
            found[rule] = first_order_speed(plan, importance(norms))
        return found

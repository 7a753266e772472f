"""The programs of a run, lowered and compiled from shapes alone, for a mesh that need not exist.

They are the very functions that training runs; only their arguments are descriptions. Prompts are
as long as `data` allows and completions as `rollout` does: the largest programs of the run.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgrpo.ahead.shapes import full_bins, row_slots
from jaxgrpo.config import Config
from jaxgrpo.devices import Device
from jaxgrpo.grpo.optimizer import Schedule, make_optimizer
from jaxgrpo.grpo.step import StepSettings, init_train_state, make_train_step
from jaxgrpo.mesh import sharding
from jaxgrpo.model.api import (
    QwenConfig,
    describe_base,
    device_plan,
    init_lora,
    lora_logical_axes,
    make_decode_weights,
)
from jaxgrpo.model.pack_rows import packing_shapes
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.types import Adapters, LoraPlan, Packing, TrainBatch, TrainState, Tree

PROGRAMS = ("layout", "rollout", "train")
"""The sampler's copy of the weights; prompts to completions; one optimizer update."""

QUICK_OPTIONS = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": "O0"}  # its name since jax 0.11
)
"""Has XLA skip what makes programs faster and compiling slow, prefetching into the chip's own
memory above all: operations and collectives stay the same. Seen: two thirds more bytes in the
train step, one third in the rollout."""


@dataclass(frozen=True)
class Arguments:
    """What the programs take, as descriptions with shardings; state, plan and batch of one arm."""

    base: Tree
    state: TrainState
    plan: LoraPlan
    prompt_tokens: Any
    prompt_mask: Any
    key: Any
    caps: Any
    batch: TrainBatch


def describe_arguments(
    config: Config, model: QwenConfig, plan: RankPlan, mesh: Mesh, optimizer: Any, arms: int = 1
) -> Arguments:
    """Shapes and shardings of the largest step of a run, or of so many arms."""
    whole = NamedSharding(mesh, PartitionSpec())

    def replicated(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

    def rows(shape: tuple[int, ...], dtype: Any) -> Any:
        names = ("act_batch", *(None,) * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, names))

    prompts, count = config.grpo.prompts_per_step, config.grpo.rows_per_step
    prompt, width = row_slots(config)
    by_token = rows((count, width), jnp.float32)
    batch = TrainBatch(
        loss_mask=by_token,
        advantages=rows((count,), jnp.float32),
        sampler_logprobs=by_token,
        trained=rows((count,), jnp.bool_),
        packing=describe_packing(config, model.of_arms(arms).device, mesh),
        old_logprobs=by_token if config.grpo.num_iterations > 1 else None,
        ref_logprobs=by_token if config.grpo.kl_coef > 0 else None,
    )
    return Arguments(
        base=describe_base(model, mesh),
        state=describe_state(model, plan, mesh, optimizer),
        plan=replicated(jax.eval_shape(lambda: device_plan(plan))),
        prompt_tokens=rows((arms * prompts, prompt), jnp.int32),
        prompt_mask=rows((arms * prompts, prompt), jnp.bool_),
        key=replicated(
            jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (arms,) * (arms > 1)))
        ),
        caps=None if arms == 1 else rows((arms * count,), jnp.int32),
        # On devices of their own each batch lies whole on all, as the adapters do.
        batch=batch if model.device.arm_shards(arms) == 1 else replicated(batch),
    )


def describe_state(
    model: QwenConfig,
    plan: RankPlan,
    mesh: Mesh,
    optimizer: Any,
    track_sensitivity: bool = False,
) -> TrainState:
    """`init_train_state` of fresh adapters, none of which is made."""
    whole, axes = NamedSharding(mesh, PartitionSpec()), lora_logical_axes(plan.modules)

    def like_lora(path: tuple, x: Any) -> jax.ShapeDtypeStruct:
        """Adam's moments lie where their adapter does."""
        names = [getattr(step, "key", None) for step in path[-2:]]
        of_module: Any = axes.get(names[0], {}) if len(names) == 2 else {}
        where = sharding(mesh, of_module[names[1]]) if names[-1] in of_module else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def fresh() -> TrainState:
        lora = init_lora(model, plan, jax.random.key(0))
        return init_train_state(lora, optimizer, track_sensitivity)

    state = jax.eval_shape(fresh)
    return jax.tree_util.tree_map_with_path(like_lora, state)


def describe_packing(config: Config, device: Device, mesh: Mesh) -> Packing:
    """The bins of a step in which no completion ends early, of what trains on such devices."""
    shards = device.batch_shards
    shape = full_bins(config, device)
    split = sharding(mesh, ("act_batch", None, None))
    arrays: Any = {
        name: jax.ShapeDtypeStruct(dims, dtype, sharding=split)
        for name, (dims, dtype) in packing_shapes(shape, shards).items()
    }
    whole = NamedSharding(mesh, PartitionSpec())
    return Packing(
        count=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),  # type: ignore[arg-type]
        **arrays,
        row_places=shape.row_places,
        shared_places=shape.shared_places,
        group_size=shape.group_size,
    )


class Lowered:
    """The programs of a run, or of several arms, on one mesh, compiled when asked for.

    Attributes:
        arguments: what they take.
        sampler: the sampler's weights as `layout` leaves them; None before it is compiled.
    """

    def __init__(
        self,
        config: Config,
        model: QwenConfig,
        plan: RankPlan,
        mesh: Mesh,
        remat: str,
        quick: bool = False,
        arms: int = 1,
    ) -> None:
        """`remat` is resolved already: devices that are not there do not tell their memory."""
        self._options: Any = QUICK_OPTIONS if quick else None
        optimizer = make_optimizer(config.optim)
        self._config, self._model, self._mesh, self._arms = config, model, mesh, arms
        self.arguments = describe_arguments(config, model, plan, mesh, optimizer, arms)
        self.sampler: Tree | None = None
        # Made outside the mesh, so that their constants stay on the host.
        stop = StopRules((model.vocab_size - 1,))
        self._generate: Any = make_generate(model, config.rollout, stop, config.grpo.group_size)
        settings = dataclasses.replace(StepSettings.of(config), remat=remat)
        self._train_step: Any = make_train_step(model, settings, optimizer)

    def compile(self, name: str) -> Any:
        """One of PROGRAMS, compiled for the mesh.

        Raises:
            jax.errors.JaxRuntimeError: the compiler refuses it, for lack of memory as a rule.
        """
        with jax.set_mesh(self._mesh):
            return {"layout": self._layout, "rollout": self._rollout, "train": self._train}[name]()

    def of_arms(self, of_one: Any) -> Any:
        """What the programs take for what one arm has."""
        return of_one if self._arms == 1 else (of_one,) * self._arms

    def _layout(self) -> Any:
        a = self.arguments
        adapters = self.of_arms(Adapters(a.state.lora, a.plan))
        lowered = make_decode_weights.lower(self._model, a.base, adapters)
        compiled = lowered.compile(self._options)
        self.sampler = describe_results(lowered, compiled)
        return compiled

    def _rollout(self) -> Any:
        if self.sampler is None:
            self._layout()
        a = self.arguments
        rows = (a.prompt_tokens, a.prompt_mask, a.key, a.caps)
        return self._generate.lower(self.sampler, *rows).compile(self._options)

    def _train(self) -> Any:
        a = self.arguments
        scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
        of_one = (a.state, a.plan, a.batch, Schedule(scalar, scalar))
        state, *others = map(self.of_arms, of_one)
        return self._train_step.lower(state, a.base, *others).compile(self._options)

    def shared_bytes(self) -> int:
        """What of the sampler's weights is training's own copy: tables in the same layout."""
        if self.sampler is None or self._mesh.shape["fsdp"] > 1:
            return 0
        return bytes_per_device([x for name, x in self.sampler.items() if name != "layers"])


def describe_results(lowered: Any, compiled: Any) -> Any:
    """Shapes of what a compiled program gives, and where it lies."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        lowered.out_info,
        compiled.output_shardings,
    )


def bytes_per_device(tree: Any) -> int:
    """What a tree of described or real arrays takes on each device."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def replace_mesh(config: Config, data: int, fsdp: int, model: int) -> Config:
    """The same run on a mesh of these sizes."""
    mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, model=model)
    return dataclasses.replace(config, mesh=mesh)

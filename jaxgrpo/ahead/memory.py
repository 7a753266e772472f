"""What a run holds in the memory of each device, by formula: for planning, not a promise.

The one place for it: `--dry-run` prints it, `check` holds it against what it compiled, and what
`check` suggests is chosen by it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax

from jaxgrpo.ahead.flops import carried_parameters
from jaxgrpo.ahead.shapes import full_bins, remat_of_run, row_slots
from jaxgrpo.config import Config
from jaxgrpo.devices import ONE_CPU
from jaxgrpo.mesh import AXIS_RULES, ROLLOUT_RULES
from jaxgrpo.model.api import base_logical_axes, init_base, lora_logical_axes
from jaxgrpo.model.pack_rows import BinShape
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.remat import head_bytes, kept_bytes_per_token
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.rollout.engine import batch_sizes

FROZEN, STATE, SAMPLER, BATCH = (
    "frozen weights",
    "adapters and optimizer",
    "sampler's weights",
    "batch",
)
WORKING = {
    "layout": "layout: working memory",
    "rollout": "rollout: caches and working memory",
    "train": "train: activations and working memory",
}
"""The kinds of memory that are told apart in what was compiled as well."""


@dataclass(frozen=True)
class Memory:
    """Bytes per device by what they are for.

    Attributes:
        held: all the time.
        layout, rollout, train: besides, while the program of that name runs.
    """

    held: dict[str, int]
    layout: dict[str, int]
    rollout: dict[str, int]
    train: dict[str, int]

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        return {"layout": self.layout, "rollout": self.rollout, "train": self.train}

    @property
    def phases(self) -> dict[str, int]:
        """Program -> all that is held while it runs."""
        held = sum(self.held.values())
        return {name: held + sum(part.values()) for name, part in self.parts.items()}

    def by_kind(self) -> dict[str, int]:
        """Kind -> bytes: what is held, SAMPLER, BATCH and the rest of each program as WORKING."""
        apart = {SAMPLER: self.layout[SAMPLER], BATCH: self.train[BATCH]}
        working = {
            WORKING[name]: sum(size for kind, size in part.items() if kind not in apart)
            for name, part in self.parts.items()
        }
        return self.held | apart | working

    @property
    def peak(self) -> int:
        return max(self.phases.values())


class Rows(NamedTuple):
    """What a layer computes at once.

    Attributes:
        tokens: places of a bin, or of rows.
        attended: places of the rows that attention makes of them, padding included.
        squares: pairs of query and key in those rows.
    """

    tokens: int
    attended: int
    squares: int


class Inside(NamedTuple):
    """What one layer holds at its fullest, as counts of arrays.

    Attributes:
        embed, mlp: of [tokens, D] and [tokens, F], in the weights' dtype.
        rows, scores: of attention's [rows, T, N H] in the weights' dtype and [rows, N, T, T] in
            float32, which are not held together with `mlp`.
    """

    embed: float
    mlp: float
    rows: float
    scores: float

    def bytes(self, model: QwenConfig, of: Rows, parts: int) -> int:
        """On one of `parts` devices of the `model` axis."""
        size, heads = model.compute_dtype.itemsize, model.num_heads
        mlp = self.mlp * of.tokens * model.intermediate_size * size / parts
        attention = self.rows * of.attended * heads * model.head_dim * size / parts
        attention += self.scores * of.squares * heads * 4 / parts
        return int(self.embed * of.tokens * model.hidden_size * size + max(mlp, attention))


PREFILL = Inside(1, 3, 0, 3)
BACKWARD = {
    "cpu": {
        "full": Inside(30, 12, 6.3, 2.6),
        "products": Inside(25, 9, 2, 2.8),
        "none": Inside(25, 9, 2, 2.8),
    },
    "gpu": dict.fromkeys(("full", "products", "none"), Inside(4, 3, 0, 0)),
    "tpu": dict.fromkeys(("full", "products", "none"), Inside(4, 4, 0, 3)),
}
"""By platform and policy, found from compiled programs. A GPU's attention is cuDNN's and writes no
scores; XLA fuses less on a CPU than elsewhere."""
NONE = Inside(12, 5, 0, 2)
"""What a layer keeps where nothing is recomputed."""


def foretell(
    config: Config,
    model: QwenConfig,
    plan: RankPlan,
    sizes: Mapping[str, int],
    remat: str,
    arms: int = 1,
) -> Memory:
    """Bytes per device in the run's largest step.

    Args:
        sizes: the mesh's (`mesh.shape`); `model.device` is what it is made of.
        remat: resolved (`remat_of_run`).
        arms: so many runs are sampled and updated together, in `Device.arm_slots`.
    """
    arms = model.device.arm_slots(arms)
    each, trained = arms // model.device.arm_shards(arms), model.of_arms(arms).device
    prompts, rows = config.grpo.prompts_per_step, config.grpo.rows_per_step
    (prompt, width), shards = row_slots(config), sizes["data"] * sizes["fsdp"]
    size = model.compute_dtype.itemsize
    adapters = sum(_held(x, 4, sizes, AXIS_RULES) for x in _adapter_leaves(model, plan))
    layers = sum(_held(x, size, sizes, ROLLOUT_RULES) for x in _layer_leaves(model))
    tables = [_held(x, size, sizes, ROLLOUT_RULES) for x in _table_leaves(model)]
    # Where training's tables are split over fsdp, the sampler has its own.
    carried = model.num_layers * carried_parameters(model, plan) * size * each
    sampler = layers + carried + (sum(tables) if sizes["fsdp"] > 1 else 0)
    own = {SAMPLER: sampler}
    slots, completions = arms * prompts // shards * prompt, arms * rows // shards
    prefilled = Rows(slots, slots, slots * prompt)
    batch, parts = full_bins(config, trained), sizes["model"]
    attended = batch.rows * batch.row_places
    computed = Rows(batch.places, attended, attended * batch.row_places)
    backward = BACKWARD[model.device.platform][remat]
    chunk = min(config.grpo.logprob_chunk_tokens, batch.places)
    train = {
        "activations kept": kept_bytes(model, computed, parts, remat),
        # One after the other.
        "a layer, or a chunk of the head": max(
            backward.bytes(model, computed, parts), head_bytes(model, chunk) // parts
        ),
        "gradient": 2 * adapters,
    }
    if arms > 1:
        on_way = _states_on_their_way(3 * adapters, arms, each, sum(train.values()))
        train["states of the arms on their way"] = on_way
    train[BATCH] = arms * batch_bytes(batch, rows // trained.batch_shards, width)
    if trained.of_rows.single_gpu:
        train["frozen weights with adapters inside"] = layers + adapters * size // 4
    if config.weight_grad_norms:
        train["gradient by the frozen weights"] = _kernel_gradient_bytes(model, plan, sizes)
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * size
    going_on = batch_sizes(completions, model.device.of_shard)[1:2]
    return Memory(
        held={
            FROZEN: sum(
                _held(x, size, sizes, AXIS_RULES)
                for x in (*_layer_leaves(model), *_table_leaves(model))
            ),
            # The adapters and two moments of Adam.
            STATE: 3 * adapters * arms,
        },
        # Joined matrices on their way, about three of the seven at once.
        layout=own | {"layers on their way": layers * 3 // 5},
        rollout=own
        | {
            "key-value cache": (slots + completions * width) * per_token,
            # One after the other; rows that go on are taken out of a cache that is still there.
            "prefill, scores of a token, or rows that go on": max(
                PREFILL.bytes(model, prefilled, parts),
                2 * 4 * completions * model.vocab_size // parts,
                sum(going_on) * width * per_token,
            ),
        },
        train=train,
    )


def fitting_arms(
    config: Config, model: QwenConfig, plan: RankPlan, sizes: Mapping[str, int], most: int
) -> int:
    """How many arms, at most so many, the devices have room for together; one where they do not
    tell their memory, as on a CPU, whose cores one arm keeps busy."""
    memory = model.device.memory
    if memory is None:
        return 1
    for arms in range(most, 1, -1):
        remat = remat_of_run(config, model, arms)
        if foretell(config, model, plan, sizes, remat, arms).peak <= memory:
            return arms
    return 1


def _states_on_their_way(state: int, arms: int, each: int, beside: int) -> int:
    """Those of a device's arms side by side for the loop over them, before it and after it; or
    those of all arms, where they are gathered, with nothing left of what was beside the loop."""
    return max(2 * each * state, arms * state - beside if each < arms else 0)


def _kernel_gradient_bytes(model: QwenConfig, plan: RankPlan, sizes: Mapping[str, int]) -> int:
    shapes = (model.module_shapes[module] for module in plan.modules)
    parameters = model.num_layers * sum(i * o for i, o in shapes)
    return 4 * parameters // sizes["fsdp"] // sizes["model"]


def batch_bytes(bins: BinShape, rows: int, width: int) -> int:
    """Three arrays by row and token; of bins four and a mask by place, and six by row."""
    return rows * 12 * width + bins.bins * (17 * bins.places + 24 * bins.rows)


def kept_bytes(model: QwenConfig, of: Rows, parts: int, remat: str) -> int:
    """What a micro-batch's forward pass keeps for its backward pass."""
    if remat == "products":
        return of.tokens * kept_bytes_per_token(model)
    if remat == "full":  # of a layer its input alone
        size = model.compute_dtype.itemsize
        return of.tokens * model.num_layers * model.hidden_size * size
    return model.num_layers * (
        NONE._replace(scores=0).bytes(model, of, parts)
        + NONE._replace(embed=0, mlp=0).bytes(model, of, parts)
    )


Leaf = tuple[tuple[int, ...], tuple[str, ...]]
"""Shape and logical axes of an array."""


def _held(leaf: Leaf, itemsize: int, sizes: Mapping[str, int], rules: dict) -> int:
    """Bytes of an array that each device of the mesh has."""

    def part(dimension: int, name: str) -> int:
        axes = rules[name] or ()
        axes = (axes,) if isinstance(axes, str) else axes
        return -(-dimension // math.prod(sizes[axis] for axis in axes))

    return itemsize * math.prod(map(part, *leaf))


@functools.cache
def _base_leaves(model: QwenConfig) -> dict[str, list[Leaf]]:
    # Shapes are the same everywhere, but what some device would run may not be there to trace.
    model = dataclasses.replace(model, device=ONE_CPU)
    shapes = jax.eval_shape(lambda: init_base(model, jax.random.key(0)))
    found: dict[str, list[Leaf]] = {}
    axes = base_logical_axes(model)
    for name, tree in shapes.items():
        paired = jax.tree.map(
            lambda names, x: (x.shape, names),
            axes[name],
            tree,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        found[name] = jax.tree.leaves(paired, is_leaf=lambda x: isinstance(x, tuple))
    return found


def _layer_leaves(model: QwenConfig) -> list[Leaf]:
    return _base_leaves(model)["layers"]


def _table_leaves(model: QwenConfig) -> list[Leaf]:
    """Embedding, head and the last norm."""
    return [x for name, leaves in _base_leaves(model).items() if name != "layers" for x in leaves]


def _adapter_leaves(model: QwenConfig, plan: RankPlan) -> list[Leaf]:
    axes, found = lora_logical_axes(plan.modules), []
    for module in plan.modules:
        ins, outs = model.module_shapes[module]
        found.append(((plan.layers, ins, plan.max_rank), axes[module]["a"]))
        found.append(((plan.layers, plan.max_rank, outs), axes[module]["b"]))
    return found

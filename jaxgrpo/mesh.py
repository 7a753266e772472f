"""The device mesh, the one table from logical to mesh axes, and the sampling keys.

Mesh axes: `data` and `fsdp` split the batch, `fsdp` also splits the frozen weights along the embed
axis, `model` splits heads, mlp and vocabulary. Axis types are Auto: the compiler places what the
table leaves open.
"""

from __future__ import annotations

import enum
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgrpo.config import ConfigError, MeshConfig
from jaxgrpo.devices import Device, default_platform
from jaxgrpo.types import stack_arms

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "model")

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "model",
    "embed": "fsdp",
    "q_heads": "model",
    # Qwen2.5 has 2 key/value heads up to 3B and 4 at 7B, fewer than a model axis may have devices,
    # and Qwen3 has 8.
    "kv_heads": None,
    "head_dim": None,
    "mlp": "model",
    "rank": None,
    "norm": None,
    "act_batch": ("data", "fsdp"),
    "act_length": None,
    "act_embed": None,
    "act_heads": "model",
    "act_kv_heads": None,
    "act_mlp": "model",
    "act_vocab": "model",
}

ROLLOUT_RULES = AXIS_RULES | {"embed": None}
"""Where the sampler's weights lie: split over `model` alone. What training splits over `fsdp` is
gathered once per iteration; left split, it would be gathered once per token."""


class Purpose(enum.IntEnum):
    """What a random key is for. Keys fold from (seed, step, purpose), so none is used twice."""

    LORA_INIT = 0
    ROLLOUT = 1
    EVAL = 2


def fold_key(seed: int, step: int, purpose: Purpose) -> jax.Array:
    """The key of one purpose at one step; nothing needs to be carried or saved."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """axis -> size over so many devices, with one size of -1 filled in.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.model]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        if devices % fixed:
            raise ConfigError(
                f"mesh: the fixed axes take {fixed} devices, which does not divide {devices}"
            )
        sizes[sizes.index(-1)] = devices // fixed
    named = dict(zip(MESH_AXES, sizes, strict=True))
    if int(np.prod(sizes)) != devices:
        raise ConfigError(
            f"mesh {named} needs {int(np.prod(sizes))} devices, there are {devices}; leave one "
            "size at -1 to fit"
        )
    return named


def planned_sizes(config: MeshConfig) -> dict[str, int]:
    """The sizes of a run's mesh on the devices here, or, if it does not fit them, as they are set,
    with 1 for what is left open."""
    try:
        return mesh_sizes(config, jax.device_count())
    except ConfigError:
        return {axis: max(1, getattr(config, axis)) for axis in MESH_AXES}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `devices` (default: all), with one size of -1 filled in.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(mesh_sizes(config, len(devices)).values())
    # A mesh axis may take a part of a torus' dimension: an 8x8 slice has room for 16x4.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(logical: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names.

    Raises:
        KeyError: a name that AXIS_RULES does not have.
    """
    return PartitionSpec(*(None if name is None else AXIS_RULES[name] for name in logical))


def sharding(mesh: Mesh, logical: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(logical))


def check_device(device: Device) -> None:
    """Asserts that the program being traced is for the mesh that surrounds it."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1 if _within_a_shard(mesh) else mesh.size
    assert mesh.empty or size == device.count, (
        f"QwenConfig.device has {device.count} devices, the mesh {size}: see device_of"
    )


def on_each_shard(function: Callable, device: Device) -> Callable:
    """`function`, of arrays that are whole on every device and then of arrays and results that are
    split along the batch, as a program that each device runs on its own part, with no word to the
    others. Where the model axis splits the weights, and on one device, the function itself.

    Within it the device is `device.of_shard`.
    """
    if device.of_shard.count == device.count:
        return function

    def sharded(whole: Any, *rows: Any) -> Any:
        split = partition_spec(("act_batch",))
        run = jax.shard_map(
            function,
            in_specs=(PartitionSpec(), *(split for _ in rows)),
            out_specs=split,
            check_vma=False,
        )
        return run(whole, *rows)

    return sharded


def over_row_shards(function: Callable, device: Device) -> Callable:
    """`function` of what is whole on every device and of what is split along the batch, as a
    program that each device runs on its own part. It returns what is summed over the devices, once
    they have all ended, and what stays split. Of what is split, a scalar is the same for all.

    Within it the device is `device.of_rows`; where the weights are split, and on one device, it is
    the function itself.
    """
    if device.of_rows.count == device.count:
        return function
    (axes,) = split = partition_spec(("act_batch",))

    def on_device(whole: Any, rows: Any) -> Any:
        summed, found = function(whole, rows)
        return jax.lax.psum(summed, axes), found

    def run(whole: Any, rows: Any) -> Any:
        of_rows = jax.tree.map(lambda x: split if x.ndim else PartitionSpec(), rows)
        return jax.shard_map(
            on_device,
            in_specs=(PartitionSpec(), of_rows),
            out_specs=(PartitionSpec(), split),
            check_vma=False,
        )(whole, rows)

    return run


def on_own_arms(function: Callable, device: Device, *, gathered: bool = True) -> Callable:
    """`function` of what is whole on every device and of arms with a leading axis, as one of (what
    is whole, what all arms have in tuples, `stack_arms`), in which each device runs its own arms
    with no word to the others, where they are spread over devices (`Device.arm_shards`).

    Within it the device is `device.of_arms`.

    Args:
        gathered: the results, whose leading axis is the arms', come whole to every device. If not,
            what device after device has found lies side by side along it.
    """

    def run(whole: Any, of_arms: tuple) -> Any:
        arms = next(len(x) for x in of_arms if x is not None)
        shards = device.arm_shards(arms)
        if shards == 1:
            return function(whole, stack_arms(of_arms))
        assert arms % shards == 0, f"{arms} arms on {shards} devices: see Device.arm_slots"
        (axes,) = split = partition_spec(("act_batch",))

        def on_device(whole: Any, of_arms: tuple) -> Any:
            each = arms // shards
            parts = [
                tuple(None if x is None else x[start : start + each] for x in of_arms)
                for start in range(0, arms, each)
            ]
            # A choice, so that no device stacks the others' too.
            choices = [functools.partial(stack_arms, part) for part in parts]
            found = function(whole, jax.lax.switch(jax.lax.axis_index(axes), choices))
            if not gathered:
                return found
            return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), found)

        return jax.shard_map(
            on_device,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec() if gathered else split,
            check_vma=False,
        )(whole, of_arms)

    return run


def _within_a_shard(mesh: Any) -> bool:
    return AxisType.Manual in mesh.axis_types


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains `x` inside a jitted function; without a mesh there is nothing to constrain.

    Raises:
        KeyError: a name that AXIS_RULES does not have, mesh or not.
        ValueError: a wrong number of names.
    """
    spec = partition_spec(logical)
    if len(logical) != x.ndim:
        raise ValueError(f"{len(logical)} axis names {logical} for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or _within_a_shard(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def to_rollout_layout(x: jax.Array, logical: Sequence[str] | None) -> jax.Array:
    """Moves a weight from training's layout to the sampler's, inside a jitted function.

    Args:
        logical: None: whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Where both layouts are one, the weight itself is handed on, and not a copy.
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return x
    axes = () if logical is None else (ROLLOUT_RULES[name] for name in logical)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def rollout_bytes(mesh: Mesh, shape: Sequence[int], itemsize: int, logical: Sequence[str]) -> int:
    """What each device receives when `to_rollout_layout` moves an array."""

    def held(rules: dict) -> int:
        where = NamedSharding(mesh, PartitionSpec(*(rules[name] for name in logical)))
        return int(np.prod(where.shard_shape(tuple(shape)))) * itemsize

    # The sampler's part of a device contains training's.
    return held(ROLLOUT_RULES) - held(AXIS_RULES)


def keep_compiled_programs() -> None:
    """Has jax keep compiled programs on disk, so that another start does not compile them again,
    nor a start from another folder.

    In `$XDG_CACHE_HOME/jaxgrpo/programs` (default ~/.cache), unless JAX_COMPILATION_CACHE_DIR says
    where; JAX_ENABLE_COMPILATION_CACHE=false switches it off. Also what compiles in less than a
    second, which jax leaves out unless JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise:
    a start waits for two dozen such programs one after the other. Not on CPU, where jax's own
    warning holds that a program is tied to the very processor, and where ours compile in seconds.
    """
    if default_platform() == "cpu":
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not jax.config.jax_hlo_source_file_canonicalization_regex:  # type: ignore[attr-defined]
        # A kernel holds the paths of its lines, and with them it would be another one elsewhere.
        root = re.escape(os.path.join(os.path.dirname(os.path.dirname(__file__)), ""))
        jax.config.update("jax_hlo_source_file_canonicalization_regex", f"^{root}")
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "jaxgrpo", "programs"))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays -> global arrays split along their first axis. The one way onto the devices."""

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        spec = sharding(mesh, ("act_batch", *(None,) * (x.ndim - 1)))
        return jax.make_array_from_callback(x.shape, spec, lambda index: x[index])

    return jax.tree.map(put, tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Host arrays -> global arrays, whole on every device."""

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, PartitionSpec()), lambda index: x[index]
        )

    return jax.tree.map(put, tree)


def to_host(tree: Any) -> Any:
    """Global arrays -> numpy, on every process. The one way off the devices."""

    def whole(x: jax.Array) -> bool:
        return x.is_fully_addressable or x.is_fully_replicated

    def fetch(x: jax.Array) -> np.ndarray:
        if whole(x):
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    for x in filter(whole, jax.tree.leaves(tree)):
        # All set off before the first is waited for.
        x.copy_to_host_async()
    return jax.tree.map(fetch, tree)

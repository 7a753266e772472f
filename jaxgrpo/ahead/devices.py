"""Devices of slices that are elsewhere, and the shapes of models that need not be downloaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxgrpo.ahead.chips import Topology
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.model.presets import PRESETS, QwenConfig
from jaxgrpo.model.weights import read_qwen_config, resolve_model_dir
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.session import resolve_dtype, resolve_plan


def slice_devices(topology: Topology) -> Sequence[Any]:
    """The devices of a slice, to compile for.

    Raises:
        ConfigError: libtpu is not installed, or does not know the slice.
    """
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=str(topology), **_host_bounds(topology)
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"topology {topology}: {line}; compiling for TPUs needs libtpu: "
            "pip install 'jaxgrpo[tpu]'"
        ) from None
    return found.devices


def _host_bounds(topology: Topology) -> dict[str, Any]:
    """How a host's chips lie, where it is not the usual 2x2."""
    if topology.chips == 1:
        return {"chips_per_host_bounds": (1, 1, 1)}
    return {}


def shapes_of(config: Config, topology: Topology | None) -> tuple[QwenConfig, RankPlan]:
    """Shapes and plan: of a published size without any file, of others from their config.json."""
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if topology is not None else resolve_dtype(dtype)
    owner, _, name = config.model.path.lower().rpartition("/")
    name = name.removesuffix("-instruct").removesuffix("-base")
    if owner == "qwen" and name in PRESETS:
        model = dataclasses.replace(PRESETS[name], dtype=dtype)
    else:
        directory = resolve_model_dir(config.model.path, config.model.revision, ["config.json"])
        model = read_qwen_config(directory, dtype)
    return model, resolve_plan(config.lora, model)[0]

"""What programs are compiled for: the devices of a mesh, as a value."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import glob
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgrpo.config import ConfigError


@dataclass(frozen=True)
class Device:
    """What a run's programs are compiled for: one device of its mesh, and how many there are.

    Made with the mesh and carried in `QwenConfig`, so that what a program does differently on
    some device is decided by its arguments and by nothing that surrounds it.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: jax's `device_kind`.
        count: devices of the mesh.
        batch_shards: into how many parts the mesh splits a batch.
        weight_shards: into how many parts it splits the frozen weights.
        memory: bytes of one device that a program may use; None: the device does not say.
        capability: a GPU's compute capability, "9.0" for Hopper.
        cores: multiprocessors of a GPU.
    """

    platform: str = "cpu"
    kind: str = "cpu"
    count: int = 1
    batch_shards: int = 1
    weight_shards: int = 1
    memory: int | None = None
    capability: str | None = None
    cores: int = 132

    @property
    def single_gpu(self) -> bool:
        """One GPU: where kernels of our own run, which know no mesh."""
        return self.platform == "gpu" and self.count == 1

    @property
    def of_shard(self) -> Device:
        """What a program runs on that is given to each device by itself, with its own part of the
        batch (`on_each_shard`): one device, unless the model axis splits the weights."""
        if self.count != self.batch_shards:
            return self
        return replace(self, count=1, batch_shards=1, weight_shards=1)

    @property
    def of_rows(self) -> Device:
        """What the gradient of a device's own rows is computed on (`over_row_shards`): one
        device, where each has the whole frozen weights; those that are split over `fsdp` training
        gathers layer by layer."""
        return self.of_shard if self.weight_shards == 1 else self

    def arm_shards(self, arms: int) -> int:
        """Over how many devices so many arms that are trained together are spread, each of them
        whole on one: all, where each has the whole frozen weights and none would be left without an
        arm. Else 1: every arm's rows are split over all devices."""
        return self.count if self.weight_shards == 1 and arms >= self.count else 1

    def arm_slots(self, arms: int) -> int:
        """Room for so many arms: as many on each device that they are spread over."""
        shards = self.arm_shards(arms)
        return -(-arms // shards) * shards

    def of_arms(self, arms: int) -> Device:
        """What each of so many arms is trained on."""
        return self if self.arm_shards(arms) == 1 else self.of_shard

    @property
    def options(self) -> dict[str, bool | str] | None:
        """Compiler options that programs want on GPU; they go with each program, so that nothing
        depends on the user's XLA_FLAGS."""
        if self.platform != "gpu":
            return None
        # cuBLAS beats Triton's matrix products in decoding, by a quarter of the whole loop.
        return {"xla_gpu_enable_triton_gemm": False}

    @property
    def decode_options(self) -> dict[str, bool | str] | None:
        """`options` for the decode loop: the whole loop as one CUDA graph, so that its many short
        kernels follow each other without the host."""
        if self.options is None or self.count > 1:
            return self.options
        recorded = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
        return self.options | {"xla_gpu_enable_command_buffer": recorded}


ONE_CPU = Device()


def device_of(mesh: Mesh, memory: int | None = None) -> Device:
    """The device that the mesh is made of.

    Args:
        memory: what it lets a program use, of devices that are elsewhere; None: they are asked.
    """
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if memory is None and own:
        memory = _memory(own[0], "bytes_limit")
    return _describe(mesh.devices.flat[0], mesh.shape, memory)


def device_here(sizes: Mapping[str, int]) -> Device:
    """What a mesh of these sizes is made of here, whether or not there are so many devices."""
    first = jax.local_devices()[0]
    return _describe(first, sizes, _memory(first, "bytes_limit"))


def _describe(device: Any, sizes: Mapping[str, int], memory: int | None) -> Device:
    return Device(
        platform=device.platform,
        kind=device.device_kind,
        count=int(np.prod(list(sizes.values()))),
        batch_shards=sizes["data"] * sizes["fsdp"],
        weight_shards=sizes["fsdp"] * sizes["model"],
        memory=memory,
        capability=getattr(device, "compute_capability", None),
        cores=getattr(device, "core_count", None) or Device.cores,
    )


def default_platform() -> str:
    """Of the devices that a mesh is made of where none are named."""
    return jax.default_backend()


def reach_devices() -> None:
    """Has jax begin to reach its devices, seconds in which a GPU's driver asks nothing of Python;
    whoever asks for them meanwhile waits. What fails here fails again for them."""

    def reach() -> None:
        with contextlib.suppress(Exception):
            jax.devices()

    threading.Thread(target=reach, daemon=True).start()


CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
"""What jax reaches NVIDIA's GPUs through."""


def check_gpu_is_used() -> None:
    """jax goes on with the processor where a GPU cannot be had: what was meant for a GPU would run
    there for days. `JAX_PLATFORMS=cpu` says that it is meant.

    Raises:
        ConfigError: jax could use this machine's GPU, but did not get it.
    """
    if default_platform() != "cpu" or jax.config.jax_platforms:  # type: ignore[attr-defined]
        return
    if not glob("/dev/nvidia[0-9]*") or not any(map(importlib.util.find_spec, CUDA_PLUGINS)):
        return
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise ConfigError(
            f"jax cannot use this machine's GPU: {' '.join(str(error).split())[:300]}; free it or "
            "mend its driver, or set JAX_PLATFORMS=cpu to run on the processor"
        ) from None


def peak_memory() -> int | None:
    """The most bytes that this process' first device has held; None: it does not say."""
    return _memory(jax.local_devices()[0], "peak_bytes_in_use")


def _memory(device: Any, name: str) -> int | None:
    return (device.memory_stats() or {}).get(name)

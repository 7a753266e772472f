"""What devices can hold and do: TPU chips and the slices they come in, and GPUs.

Figures of TPUs are the vendor's: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and,
for one axis of the torus, https://jax-ml.github.io/scaling-book/tpus. No jax.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxgrpo.config import ConfigError, suggestion

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        hbm_bytes: what a program may use of its memory; the runtime keeps the rest for itself.
        bandwidth: bytes per second between the chip and its memory.
        flops: bfloat16 operations per second.
        link_bandwidth: bytes per second that a ring along one axis of the torus moves, both
            directions together.
        torus: how many dimensions a topology has.
        longest: chips along each dimension of the largest slice.
        per_host: chips of one host in a slice of several hosts.
    """

    name: str
    hbm_bytes: int
    bandwidth: float
    flops: float
    link_bandwidth: float
    torus: int
    longest: tuple[int, ...]
    per_host: int = 4


CHIPS = {
    "v5e": Chip("v5e", int(15.75 * GIB), 8.1e11, 1.97e14, 9e10, 2, (16, 16)),
    "v5p": Chip("v5p", int(95.74 * GIB), 2.765e12, 4.59e14, 1.8e11, 3, (16, 16, 24)),
    "v6e": Chip("v6e", int(31.25 * GIB), 1.64e12, 9.18e14, 1.8e11, 2, (16, 16)),
}

LINK_SECONDS = 1e-6
"""What one hop between neighbours costs however little is sent: the scaling book's round figure."""


@dataclass(frozen=True)
class Topology:
    """A slice: a chip and how many of them stand along each dimension."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Hosts of the slice; up to eight v5e or v6e chips can share one."""
        single = 8 if self.chip.torus == 2 else 4
        return 1 if self.chips <= single else self.chips // self.chip.per_host

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """Reads `v5e:4x4`.

    Raises:
        ConfigError: no such chip, or a shape that its slices cannot have.
    """
    match = re.fullmatch(r"([a-z0-9]{1,8}):([0-9]{1,3}(?:x[0-9]{1,3}){1,3})", text)
    if match is None:
        raise ConfigError(f"topology {text!r:.40} is not written as CHIP:AxB, for instance v5e:4x4")
    name, numbers = match[1], match[2]
    if name not in CHIPS:
        raise ConfigError(f"topology {text}: unknown chip '{name}'; {suggestion(name, [*CHIPS])}")
    chip, shape = CHIPS[name], tuple(map(int, numbers.split("x")))
    if len(shape) != chip.torus:
        example = str(smallest_topology(chip, 8))
        raise ConfigError(
            f"topology {text}: {name} slices have {chip.torus} dimensions, for instance {example}"
        )
    if shape not in slice_shapes(chip):
        near = min(slice_shapes(chip), key=lambda s: (abs(math.prod(s) - math.prod(shape)), s))
        raise ConfigError(f"topology {text}: there is no such slice; {Topology(chip, near)} is one")
    return Topology(chip, shape)


def slice_shapes(chip: Chip) -> list[tuple[int, ...]]:
    """Every slice of a chip, smallest first."""
    if chip.torus == 2:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    sides = range(4, 25, 4)
    cubes = [(x, y, z) for x in sides for y in sides for z in sides if x <= y <= z]
    cubes = [s for s in cubes if all(a <= b for a, b in zip(s, chip.longest, strict=True))]
    return sorted([*small, *cubes], key=lambda s: (math.prod(s), max(s)))


def smallest_topology(chip: Chip, chips: int) -> Topology | None:
    """The smallest slice of at least so many chips, or None."""
    return next((Topology(chip, s) for s in slice_shapes(chip) if math.prod(s) >= chips), None)


@dataclass(frozen=True)
class Card:
    """What a GPU can do, as measured on it.

    Attributes:
        bandwidth: bytes read and written per second, by a large copy.
        flops: bfloat16 operations per second, by a large matrix product on random data.
    """

    bandwidth: float
    flops: float


CARDS = {
    "NVIDIA H200": Card(bandwidth=4.3e12, flops=790e12),
    "NVIDIA H100 80GB HBM3": Card(bandwidth=3.0e12, flops=780e12),
}
"""Known GPUs by `device_kind`; for others there is no least time to compare with."""

"""Flags by which XLA compiles for CPUs in a quarter of the time, for the tests' small programs, of
which most run once. Nothing but the standard library: they must be set before jax is imported."""

import functools
import importlib.util
import mmap
from pathlib import Path

FLAGS = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")


@functools.cache
def quick_flags() -> str:
    """Those of `FLAGS` that this jaxlib knows: one that it does not know ends the process."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None and spec.origin is not None
    known = []
    for path in sorted(Path(spec.origin).parent.glob("libjax_common.*")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
            known += [flag for flag in FLAGS if code.find(_name(flag)) >= 0]
    return " ".join(known)


def _name(flag: str) -> bytes:
    return flag.removeprefix("--").partition("=")[0].encode()

"""Flags by which XLA compiles for CPUs in a quarter of the time, for the tests' small programs, of
which most run once. Nothing but the standard library: they must be set before jax is imported."""

from importlib.metadata import version

UNTIL_11 = ("--xla_cpu_use_fusion_emitters=false",)
"""Gone with jaxlib 0.11, and a flag that XLA does not know ends the process."""


def quick_flags() -> str:
    """Those that this jaxlib knows."""
    known = ["--xla_backend_optimization_level=0"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        known += UNTIL_11
    return " ".join(known)

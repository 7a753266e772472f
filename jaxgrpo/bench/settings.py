"""What `bench` measures. No jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxgrpo.config import Config, ConfigError

Phase = Literal["rollout", "train", "step"]
PHASES: tuple[Phase, ...] = ("rollout", "train", "step")

SIGMA = 0.8
"""Spread of log-normal lengths: the longest of 256 is about nine times the median."""


@dataclass(frozen=True)
class BenchSettings:
    """Shapes and repeats."""

    preset: str = "qwen2.5-1.5b"
    """Shapes of the model, or `embedded`; its weights are random."""
    num_layers: int | None = None
    """Default: the preset's."""
    prompt_tokens: int = 128
    lengths: Literal["equal", "lognormal"] = "equal"
    """Completion lengths: all rollout.max_completion_tokens, or log-normal with `mean_tokens` and
    sigma 0.8, cut at that cap."""
    mean_tokens: int = 200
    repeats: int = 5
    breakdown: bool = False
    """Also time the parts of a step, each as a program of its own."""
    profile: str | None = None
    """Directory for a trace of one run; what its kernels took is printed."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "mean_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench.{name} must be at least 1")
        if self.num_layers is not None and self.num_layers < 1:
            raise ConfigError("bench.num_layers must be at least 1")


@dataclass(frozen=True)
class BenchConfig(Config):
    """A run's settings, and what to measure of it."""

    phase: Phase = "step"
    bench: BenchSettings = field(default_factory=BenchSettings)

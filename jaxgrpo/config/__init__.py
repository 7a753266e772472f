"""Run configuration as frozen dataclasses, each checking its own values.

Defaults live here only; a YAML file states differences (`config_files.py` reads it). No jax.
"""

from jaxgrpo.config.errors import ConfigError, check_choice, suggestion
from jaxgrpo.config.model import (
    EMBEDDED,
    MAX_RANK,
    MODULES,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ScaleRule,
)
from jaxgrpo.config.sampling import DEV_SPLIT, DataConfig, EvalConfig, RolloutConfig
from jaxgrpo.config.training import Config, Correction, GrpoConfig, LossName, Objective, OptimConfig

__all__ = [
    "DEV_SPLIT",
    "EMBEDDED",
    "MAX_RANK",
    "MODULES",
    "Config",
    "ConfigError",
    "Correction",
    "DataConfig",
    "EvalConfig",
    "GrpoConfig",
    "LoraConfig",
    "LossName",
    "MeshConfig",
    "ModelConfig",
    "Objective",
    "OptimConfig",
    "RolloutConfig",
    "ScaleRule",
    "check_choice",
    "suggestion",
]

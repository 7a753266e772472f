"""The compiled programs of a run, and of several arms that share them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxgrpo.grpo.logprobs import make_logprobs
from jaxgrpo.grpo.optimizer import make_optimizer
from jaxgrpo.grpo.step import StepSettings, make_train_step
from jaxgrpo.model.api import make_decode_weights
from jaxgrpo.session import Session
from jaxgrpo.types import Rollout, Tree


@dataclass(frozen=True)
class Programs:
    """The compiled programs of a run, or of several arms; each takes the plan as an argument.

    Attributes:
        decode_weights: (base, adapters) -> the sampler's weights.
        arms: how many are sampled and updated together, those included that fill the devices up
            (`Device.arm_slots`). Of more than one the programs take tuples; evaluations are
            of one.
    """

    decode_weights: Callable[..., Tree]
    generate: Callable[..., Rollout]
    generate_eval: Callable[..., Rollout]
    generate_greedy: Callable[..., Rollout]
    logprobs: Callable[..., jax.Array]
    train_step: Callable[..., Any]
    optimizer: optax.GradientTransformation
    arms: int = 1

    def filled(self, of_arms: Sequence[Any]) -> tuple:
        """What arms have, with the first one's again for those that are not there."""
        return (*of_arms, *[of_arms[0]] * (self.arms - len(of_arms)))


def make_programs(session: Session, arms: int = 1) -> Programs:
    """The programs of runs with this configuration; with room for so many arms, whatever their
    seed, plan, scale rule, learning rate and number of steps."""
    config = session.config
    optimizer = make_optimizer(config.optim)
    return Programs(
        decode_weights=functools.partial(make_decode_weights, session.model_config),
        generate=session.make_generate(evaluation=False),
        generate_eval=session.make_generate(evaluation=True),
        generate_greedy=session.make_generate(evaluation=True, greedy=True),
        logprobs=make_logprobs(
            session.model_config,
            config.rollout.temperature,
            config.grpo.logprob_chunk_tokens,
            "none",
        ),
        train_step=make_train_step(session.model_config, StepSettings.of(config), optimizer),
        optimizer=optimizer,
        arms=session.model_config.device.arm_slots(arms),
    )

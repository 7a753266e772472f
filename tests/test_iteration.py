"""Whole steps of the embedded model: after the first, nothing is compiled any more."""

import dataclasses

import jax
import numpy as np
from rich.console import Console

from jaxgrpo.config_files import load_config
from jaxgrpo.grpo.step import init_train_state
from jaxgrpo.iteration import run_step
from jaxgrpo.mesh import shard_rows, to_host
from jaxgrpo.programs import make_programs
from jaxgrpo.run import EMBEDDED_CONFIG
from jaxgrpo.study.lab import Lab
from tests.compiled import compilations


def test_after_the_first_step_nothing_compiles_whatever_lengths_and_flat_groups_come():
    """Completions are cut to what each step allows: all to one token, where every group is flat
    and no bin runs, or to lengths at random."""
    small = ["grpo.prompts_per_step=8", "grpo.group_size=4", "grpo.micro_batches=4", "lora.rank=4"]
    config = load_config([EMBEDDED_CONFIG], [*small, "rollout.max_completion_tokens=24"])
    session = Lab(config, Console(quiet=True)).session
    programs = make_programs(session)
    rng = np.random.default_rng(0)

    def cut(rollout, longest):
        lengths = np.minimum(rollout.lengths, rng.integers(1, longest + 1, len(rollout.lengths)))
        mask = np.arange(24) < lengths[:, None]
        return dataclasses.replace(
            rollout,
            tokens=rollout.tokens * mask,
            mask=mask,
            logprobs=rollout.logprobs * mask,
            lengths=lengths.astype(np.int32),
        )

    def cutting(longest):
        def generate(*args):
            return shard_rows(session.mesh, cut(to_host(programs.generate(*args)), longest))

        return dataclasses.replace(programs, generate=generate)

    found = []
    with jax.set_mesh(session.mesh):
        state = init_train_state(session.init_lora(), programs.optimizer)
        state, _ = run_step(session, programs, state, 0)
        with compilations() as compiled:
            for step, longest in enumerate((1, 24, 6, 24), start=1):
                state, result = run_step(session, cutting(longest), state, step)
                found.append(result.metrics["packing/bins"])
    assert not compiled
    assert found[0] == 0 and len(set(found)) > 1, found

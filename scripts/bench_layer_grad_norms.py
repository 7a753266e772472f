"""What the per-layer gradient norms cost: the step without, with views 1-3, with all.

    python scripts/bench_layer_grad_norms.py [key=value ...]

Settings are those of `python -m jaxgrpo.run bench train`, for instance bench.num_layers=8
grpo.prompts_per_step=8. "None" is a step whose norms nobody asks for, so that XLA leaves them out.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from jaxgrpo.bench.measure import Bench, environment
from jaxgrpo.commands.bench import BENCH
from jaxgrpo.commands.command import parse_settings
from jaxgrpo.grpo.optimizer import Schedule
from jaxgrpo.grpo.step import StepSettings, init_train_state, make_train_step

VARIANTS = {"none": (False, False), "1-3": (False, True), "1-4": (True, True)}
"""Views -> whether the step differentiates by the frozen weights, whether it returns the norms."""

LIMITS = {"1-3": 1.02, "1-4": 2.0}


def measure(bench: Bench, by_kernels: bool, keep: bool) -> list[float]:
    """Seconds of each run, the one that compiles first."""
    config = bench.config
    # Its function without its own jit, whose compiler options only the outermost may have.
    settings = dataclasses.replace(StepSettings.of(config), weight_grad_norms=by_kernels)
    step = make_train_step(bench.model, settings, bench.optimizer).__wrapped__

    def run(state, base, plan, batch):
        state, report = step(state, base, plan, batch, schedule)
        return state, report if keep else report.scalars

    run = jax.jit(run, donate_argnums=0, compiler_options=bench.model.device.options)
    state = init_train_state(jax.tree.map(jnp.array, bench.lora), bench.optimizer)
    batch, schedule = bench.make_batch(bench.make_completions()), Schedule.of(config)
    times = []
    for _ in range(config.bench.repeats + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(run(state, bench.base, bench.plan, batch))
        times.append(time.perf_counter() - start)
    return times


def main(words: list[str]) -> None:
    bench = Bench(parse_settings("bench", BENCH, words))
    with jax.set_mesh(bench.mesh):
        compare(bench)


def compare(bench: Bench) -> None:
    medians = {}
    for name, variant in VARIANTS.items():
        times = measure(bench, *variant)
        medians[name] = statistics.median(times[1:])
        spread = max(times[1:]) - min(times[1:])
        print(
            f"views {name}: {medians[name] * 1e3:.2f} ms (spread {spread * 1e3:.2f} ms, "
            f"first {times[0]:.1f} s)",
            flush=True,
        )
    for name, limit in LIMITS.items():
        print(f"views {name} / none = {medians[name] / medians['none']:.4f} (limit {limit})")
    print(environment())


if __name__ == "__main__":
    main(sys.argv[1:])

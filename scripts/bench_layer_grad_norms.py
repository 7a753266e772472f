"""What the per-layer gradient norms cost: the train step without them, with views 1-3, with all four.

    python scripts/bench_layer_grad_norms.py [preset] [layers] [rows] [remat]

Random weights at a preset's shapes, rank 32, one micro-batch of rows of 128 + 256 tokens. Without
norms means a step whose norms nobody asks for, so that XLA leaves them out.
"""

from __future__ import annotations

import statistics
import sys
import time

import jax

from jaxgrpo.bench import Bench, BenchConfig, BenchSettings, environment
from jaxgrpo.config import GrpoConfig, LoraConfig, RolloutConfig
from jaxgrpo.grpo.step import init_train_state, make_train_step
from jaxgrpo.mesh import gpu_options

REPEATS = 7


def main(
    preset: str = "qwen2.5-1.5b", layers: str = "28", rows: str = "64", remat: str = "auto"
) -> None:
    config = BenchConfig(
        lora=LoraConfig(rank=32),
        rollout=RolloutConfig(max_completion_tokens=256),
        grpo=GrpoConfig(prompts_per_step=int(rows) // 8, group_size=8, logprob_chunk_tokens=4096),
        bench=BenchSettings(preset=preset, num_layers=int(layers)),
    )
    bench = Bench(config)
    batch = bench._batch(bench._completions(bench._lengths()))
    seconds = {}
    for name, by_kernels, keep in (("none", False, False), ("1-3", False, True), ("1-4", True, True)):
        step = make_train_step(
            bench.model, config.grpo, 1.0, 256, remat, bench.optimizer,
            weight_grad_norms=by_kernels,
        )  # fmt: skip

        def run(state, base, plan, batch, step=step, keep=keep):
            state, report = step(state, base, plan, batch)
            return state, report if keep else report.scalars

        run = jax.jit(run, donate_argnums=0, compiler_options=gpu_options())
        state = init_train_state(jax.tree.map(jax.numpy.array, bench.lora), bench.optimizer)
        times = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            state, report = jax.block_until_ready(run(state, bench.base, bench.plan, batch))
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times[1:])
        spread = max(times[1:]) - min(times[1:])
        print(f"views {name}: {seconds[name] * 1e3:.2f} ms (spread {spread * 1e3:.2f} ms, "
              f"first {times[0]:.1f} s)", flush=True)  # fmt: skip
    for name, limit in (("1-3", 1.02), ("1-4", 2.0)):
        print(f"views {name} / none = {seconds[name] / seconds['none']:.4f} (limit {limit})")
    print(environment())


if __name__ == "__main__":
    main(*sys.argv[1:])

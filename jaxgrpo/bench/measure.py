"""Speed of the rollout, the train step or the whole step: random weights, synthetic prompts.

Shapes come from a preset, everything else from the ordinary configuration. What is timed is what
training runs. Each figure is the median of `bench.repeats` runs after one that compiles.
"""

from __future__ import annotations

import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.ahead.chips import CARDS
from jaxgrpo.ahead.flops import decode_seconds, train_model_flops
from jaxgrpo.bench.kernels import profile_kernels
from jaxgrpo.bench.settings import SIGMA, BenchConfig
from jaxgrpo.config import EMBEDDED, check_choice
from jaxgrpo.devices import Device, device_of, peak_memory
from jaxgrpo.grpo.logprobs import make_logprobs
from jaxgrpo.grpo.optimizer import Schedule, make_optimizer
from jaxgrpo.grpo.step import (
    StepSettings,
    TrainStep,
    init_train_state,
    make_gradients,
    make_train_step,
)
from jaxgrpo.mesh import (
    keep_compiled_programs,
    make_mesh,
    on_each_shard,
    replicate,
    shard_rows,
    sharding,
    to_host,
)
from jaxgrpo.model.api import (
    PRESETS,
    QwenConfig,
    base_logical_axes,
    device_plan,
    init_base,
    init_lora,
    make_decode_weights,
    prefill,
)
from jaxgrpo.model.weights import EMBEDDED_DIR, read_qwen_config
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.records.run_directory import atomic_write_json
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.session import check_divisible, check_model_axis, place_lora, resolve_dtype
from jaxgrpo.train_batches import pack_batch
from jaxgrpo.types import Adapters, PromptBatch, Rollout, TrainBatch, TrainState, Tree


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Measures config.phase; the figures by name, units in the names.

    Raises:
        ConfigError: an unknown preset.
        OSError: bench.out cannot be written.
    """
    bench = Bench(config)
    figures = {"rollout": bench.rollout, "train": bench.train, "step": bench.step}
    with jax.set_mesh(bench.mesh):
        found = environment() | {"mesh": dict(bench.mesh.shape)} | figures[config.phase]()
    if config.bench.out is not None:
        atomic_write_json(Path(config.bench.out), found)
    return found


def environment() -> dict[str, str]:
    """Device and versions, without which no figure means anything."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {"device": jax.devices()[0].device_kind} | versions


def bench_model(config: BenchConfig, device: Device) -> QwenConfig:
    """The shapes that `bench.preset` and `bench.num_layers` name, for this device.

    Raises:
        ConfigError: an unknown preset.
    """
    bench, dtype = config.bench, resolve_dtype(config.model.dtype)
    if bench.preset == EMBEDDED:
        model = read_qwen_config(EMBEDDED_DIR, dtype)
    else:
        check_choice(bench.preset, [EMBEDDED, *PRESETS], "bench.preset")
        model = replace(PRESETS[bench.preset], dtype=dtype)
    model = replace(model, device=device)
    return model if bench.num_layers is None else replace(model, num_layers=bench.num_layers)


class Bench:
    """The programs and arrays of one configuration, on the mesh that it names; to be used within
    `jax.set_mesh(bench.mesh)`, as training runs.

    Attributes:
        lengths: completion tokens of each row.
        step, state: the train step as (batch) -> report; it consumes its state, so `state[0]` is
            the newest.
    """

    def __init__(self, config: BenchConfig) -> None:
        keep_compiled_programs()
        self.mesh = make_mesh(config.mesh)
        check_divisible(config, self.mesh, evaluates=False)
        model = bench_model(config, device_of(self.mesh))
        check_model_axis(model, self.mesh)
        self.config, self.model = config, model
        placed = jax.tree.map(
            lambda axes: sharding(self.mesh, axes),
            base_logical_axes(model),
            is_leaf=lambda x: isinstance(x, tuple),
        )
        init = jax.jit(init_base, static_argnums=0, out_shardings=placed)
        self.base: Tree = init(model, jax.random.key(0))
        plan = make_rank_plan(config.lora, model.num_layers)
        self.plan = replicate(self.mesh, device_plan(plan))
        self.lora = place_lora(self.mesh, init_lora(model, plan, jax.random.key(1)))
        self.optimizer = make_optimizer(config.optim)
        # No row ends by itself: the stop token is one that does not exist.
        self.generate = make_generate(
            model, config.rollout, StopRules((model.vocab_size,)), config.grpo.group_size
        )
        self.rng = np.random.default_rng(config.seed)
        self.prompts = self._make_prompts()
        self.lengths = self._make_lengths()

    def rollout(self) -> dict[str, Any]:
        """Prefill and decoding."""
        rows, width = self.config.grpo.rows_per_step, self.config.rollout.max_completion_tokens
        prompts, length = self.prompts.tokens.shape
        first, seconds = self._time(lambda: self.sample(self.lora))
        found: dict[str, Any] = {
            "rows": rows,
            "rollout_s": seconds,
            "first_rollout_s": first,
            "rollout_tokens_per_s": int(self.lengths.sum()) / seconds,
            "token_step_ms": 1e3 * seconds / width,
        }
        card = CARDS.get(self.model.device.kind)
        if card is not None and self.config.bench.lengths == "equal":
            group = self.config.grpo.group_size
            floor = decode_seconds(self.model, card, prompts, group, length, width)
            found["decode_share_of_floor"] = floor / seconds
        return found | self._memory() | self._kernels(lambda: self.sample(self.lora))

    def train(self) -> dict[str, Any]:
        """Forward, backward and update on completions of given lengths."""
        batch = self.make_batch(self.make_completions())
        step, _ = self.make_step()
        first, seconds = self._time(lambda: step(batch))
        prompt_tokens = self.config.grpo.rows_per_step * self.config.bench.prompt_tokens
        scored = int(self.lengths.sum())
        # Counted as if every row ran its prompt: the work that any trainer of whole rows does.
        flops = train_model_flops(self.model, prompt_tokens + scored, scored)
        shards, _, places = batch.packing.tokens.shape
        computed = int(batch.packing.count) * shards * places
        shared = prompt_tokens // self.config.grpo.group_size
        own = train_model_flops(self.model, shared + scored, scored)
        found = {
            "train_s": seconds,
            "first_train_s": first,
            "train_tokens_per_s": (prompt_tokens + scored) / seconds,
            "completion_tokens_per_s": scored / seconds,
            "model_tflops": flops / seconds / 1e12,
            "model_tflops_prompts_once": own / seconds / 1e12,
            "computed_tokens": computed,
        }
        if self.config.bench.breakdown:
            found |= self._parts_of_training(batch)
        return found | self._memory() | self._kernels(lambda: step(batch))

    def step(self) -> dict[str, Any]:
        """A whole step as training runs it, tokenizer and rewards aside."""
        step, state = self.make_step()
        laps: dict[str, list[float]] = {"rollout": [], "host": [], "train": []}

        def once() -> Any:
            start = time.perf_counter()
            host = to_host(self.sample(state[0].lora))
            sampled = time.perf_counter()
            batch = self.make_batch(host)
            packed = time.perf_counter()
            report = to_host(step(batch))
            end = time.perf_counter()
            for name, lap in zip(
                laps, (sampled - start, packed - sampled, end - packed), strict=True
            ):
                laps[name].append(lap)
            return report

        first, seconds = self._time(once)
        found: dict[str, Any] = {"step_s": seconds, "first_step_s": first}
        found |= {f"{name}_s": statistics.median(lap[1:]) for name, lap in laps.items()}
        if self.config.bench.breakdown:
            found |= self._parts_of_sampling()
            found |= self._parts_of_training(self.make_batch(self.make_completions()))
        return found | self._memory() | self._kernels(once)

    def sample(self, lora: Tree) -> Rollout:
        """Lays out the weights and samples."""
        key = jax.random.key(self.config.seed)
        weights = self._decode_weights(lora)
        prompts = (self.prompts.tokens, self.prompts.mask)
        tokens, mask, caps = shard_rows(self.mesh, (*prompts, self.lengths))
        return self.generate(weights, tokens, mask, key, caps)

    def make_step(
        self, *, weight_grad_norms: bool | None = None
    ) -> tuple[Callable[[TrainBatch], Any], list[TrainState]]:
        """The train step as (batch) -> report, and the place of its newest state."""
        settings = replace(StepSettings.of(self.config), objective="grpo")
        if weight_grad_norms is not None:
            settings = replace(settings, weight_grad_norms=weight_grad_norms)
        train_step: TrainStep = make_train_step(self.model, settings, self.optimizer)
        state = [init_train_state(jax.tree.map(jnp.array, self.lora), self.optimizer)]
        schedule = Schedule.of(self.config)

        def step(batch: TrainBatch) -> Any:
            state[0], report = train_step(state[0], self.base, self.plan, batch, schedule)
            return report

        return step, state

    def make_completions(self) -> Rollout:
        """Random completions of `lengths` tokens, as if sampled uniformly."""
        shape = (len(self.lengths), self.config.rollout.max_completion_tokens)
        mask = np.arange(shape[1])[None, :] < self.lengths[:, None]
        tokens = self.rng.integers(0, self.model.vocab_size, shape).astype(np.int32) * mask
        logprobs = np.where(mask, -np.log(self.model.vocab_size), 0.0).astype(np.float32)
        reasons = np.zeros(shape[0], np.int32)
        return Rollout(*map(jnp.asarray, (tokens, mask, logprobs, self.lengths, reasons)))

    def make_batch(self, rollout: Rollout) -> TrainBatch:
        """The rows on the device, packed as training packs them, with random advantages."""
        advantages = self.rng.normal(size=len(self.lengths)).astype(np.float32)
        return pack_batch(self.mesh, self.config.grpo, self.prompts, rollout, advantages)

    def _decode_weights(self, lora: Tree) -> Tree:
        return make_decode_weights(self.model, self.base, Adapters(lora, self.plan))

    def _parts_of_sampling(self) -> dict[str, float]:
        """Laying out the weights (`layout_s`) and prefill by themselves; the rest is decoding."""
        weights = self._decode_weights(self.lora)
        model = self.model.of_shard
        of_shard = on_each_shard(functools.partial(prefill, model), self.model.device)
        run = jax.jit(of_shard, compiler_options=model.device.options)
        tokens, mask = shard_rows(self.mesh, (self.prompts.tokens, self.prompts.mask))
        return {
            "layout_s": self._time(lambda: self._decode_weights(self.lora))[1],
            "prefill_s": self._time(lambda: run(weights, tokens, mask))[1],
        }

    def _parts_of_training(self, batch: TrainBatch) -> dict[str, float]:
        """Log-probs alone (forward), and gradients without the update."""
        config = self.config
        logprobs = make_logprobs(
            self.model,
            config.rollout.temperature,
            config.grpo.logprob_chunk_tokens,
            "none",
        )
        settings = replace(StepSettings.of(config), objective="grpo", weight_grad_norms=False)
        gradients = jax.jit(
            make_gradients(self.model, settings), compiler_options=self.model.device.options
        )
        run = (self.base, Adapters(self.lora, self.plan), batch)
        return {
            "logprobs_s": self._time(lambda: logprobs(*run))[1],
            "forward_backward_s": self._time(lambda: gradients(*run))[1],
        }

    def _make_prompts(self) -> PromptBatch:
        shape = (self.config.grpo.prompts_per_step, self.config.bench.prompt_tokens)
        tokens = self.rng.integers(0, self.model.vocab_size, shape).astype(np.int32)
        names = [""] * shape[0]
        return PromptBatch(tokens, np.ones(shape, bool), names, names, list(range(shape[0])))

    def _make_lengths(self) -> np.ndarray:
        rows, cap = self.config.grpo.rows_per_step, self.config.rollout.max_completion_tokens
        if self.config.bench.lengths == "equal":
            return np.full(rows, cap, np.int32)
        mean = np.log(self.config.bench.mean_tokens) - SIGMA**2 / 2
        return np.clip(self.rng.lognormal(mean, SIGMA, rows), 1, cap).astype(np.int32)

    def _time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of the first run, and the median of the others."""
        seconds = []
        for _ in range(self.config.bench.repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start)
        return seconds[0], statistics.median(seconds[1:])

    def _memory(self) -> dict[str, float]:
        peak = peak_memory()
        return {} if peak is None else {"peak_memory_gib": peak / 2**30}

    def _kernels(self, run: Callable[[], Any]) -> dict[str, Any]:
        if self.config.bench.profile is None:
            return {}
        return {"kernels": profile_kernels(run, Path(self.config.bench.profile))}

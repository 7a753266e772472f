"""Speed of the rollout, the train step or the whole step: random weights, synthetic prompts.

Shapes come from a preset, everything else from the ordinary configuration. What is timed is what
training runs. Each figure is the median of `bench.repeats` runs after one that compiles.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.data import train_rows
from jaxgrpo.floor import DEVICES, decode_seconds, train_flops
from jaxgrpo.grpo.optimizer import make_optimizer
from jaxgrpo.grpo.step import TrainStep, init_train_state, make_train_step
from jaxgrpo.iteration import bin_sizes
from jaxgrpo.mesh import to_host
from jaxgrpo.model.api import (
    PRESETS,
    Qwen2Config,
    device_plan,
    init_base,
    init_lora,
    make_decode_weights,
)
from jaxgrpo.packing import pack_rows
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules
from jaxgrpo.session import resolve_dtype
from jaxgrpo.types import PromptBatch, Rollout, TrainBatch, TrainState, Tree

Phase = Literal["rollout", "train", "step"]


@dataclass(frozen=True)
class BenchSettings:
    """What is measured."""

    phase: Phase = "step"
    preset: str = "qwen2.5-1.5b"
    num_layers: int | None = None
    """Default: the preset's."""
    prompt_tokens: int = 128
    lengths: Literal["equal", "lognormal"] = "equal"
    """Completion lengths in training: all rollout.max_completion_tokens, or log-normal with
    `mean_tokens` and sigma 0.8, cut at that cap. Rollouts never stop early."""
    mean_tokens: int = 200
    repeats: int = 5
    out: str | None = None
    """Also write the figures to this file, as JSON."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"bench.preset: '{self.preset}' is none of {', '.join(PRESETS)}")
        if self.repeats < 1 or self.prompt_tokens < 1 or self.mean_tokens < 1:
            raise ConfigError("bench: repeats, prompt_tokens and mean_tokens must be at least 1")


@dataclass(frozen=True)
class BenchConfig(Config):
    """A run's configuration and what to measure of it."""

    bench: BenchSettings = field(default_factory=BenchSettings)


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Measures config.bench.phase; the figures by name, units in the names."""
    bench = Bench(config)
    figures = {"rollout": bench.rollout, "train": bench.train, "step": bench.step}
    found = environment() | figures[config.bench.phase]()
    if config.bench.out is not None:
        Path(config.bench.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def environment() -> dict[str, str]:
    """Device and versions, without which no figure means anything."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {"device": jax.devices()[0].device_kind} | versions


class Bench:
    """The programs and arrays of one configuration on one device."""

    def __init__(self, config: BenchConfig) -> None:
        bench = config.bench
        model = replace(PRESETS[bench.preset], dtype=resolve_dtype(config.model.dtype))
        if bench.num_layers is not None:
            model = replace(model, num_layers=bench.num_layers)
        self.config, self.model = config, model
        self.base: Tree = jax.jit(init_base, static_argnums=0)(model, jax.random.key(0))
        plan = make_rank_plan(config.lora, model.num_layers)
        self.plan = device_plan(plan)
        self.lora = init_lora(model, plan, jax.random.key(1))
        self.optimizer = make_optimizer(config.optim, 1000)
        self.generate = make_generate(
            model, config.rollout, StopRules((model.vocab_size,)), config.grpo.group_size
        )
        self.rng = np.random.default_rng(config.seed)
        self.prompts = self._make_prompts()

    def rollout(self) -> dict[str, Any]:
        """Prefill and decoding."""
        rows, width = self.config.grpo.rows_per_step, self.config.rollout.max_completion_tokens
        prompts, length = self.prompts.tokens.shape
        first, seconds = self._time(lambda: self._sample(self.lora))
        found = {
            "rows": rows,
            "rollout_s": seconds,
            "first_rollout_s": first,
            "rollout_tokens_per_s": rows * width / seconds,
            "token_step_ms": 1e3 * seconds / width,
        }
        device = DEVICES.get(jax.devices()[0].device_kind)
        if device is not None:
            group = self.config.grpo.group_size
            floor = decode_seconds(self.model, device, prompts, group, length, width)
            found["decode_share_of_floor"] = floor / seconds
        return found | self._memory()

    def train(self) -> dict[str, Any]:
        """Forward, backward and update on completions of given lengths."""
        lengths = self._lengths()
        batch = self._batch(self._completions(lengths))
        step, _ = self._train_step()
        first, seconds = self._time(lambda: step(batch))
        prompt_tokens = self.config.grpo.rows_per_step * self.config.bench.prompt_tokens
        scored = int(lengths.sum())
        # Counted as if every row ran its prompt: the work that any trainer of whole rows does.
        flops = train_flops(self.model, prompt_tokens + scored, scored)
        computed = self.config.grpo.rows_per_step * batch.tokens.shape[1]
        if batch.packing is not None:
            computed = int(np.prod(batch.packing.tokens.shape))
        shared = prompt_tokens // self.config.grpo.group_size
        own = train_flops(self.model, shared + scored, scored)
        return {
            "train_s": seconds,
            "first_train_s": first,
            "train_tokens_per_s": (prompt_tokens + scored) / seconds,
            "completion_tokens_per_s": scored / seconds,
            "model_tflops": flops / seconds / 1e12,
            "model_tflops_prompts_once": own / seconds / 1e12,
            "computed_tokens": computed,
        } | self._memory()

    def step(self) -> dict[str, Any]:
        """A whole step as training runs it, tokenizer and rewards aside."""
        step, state = self._train_step()
        laps: dict[str, list[float]] = {"rollout": [], "host": [], "train": []}

        def once() -> Any:
            start = time.perf_counter()
            host = to_host(self._sample(state[0].lora))
            sampled = time.perf_counter()
            batch = jax.block_until_ready(self._batch(host))
            packed = time.perf_counter()
            report = to_host(step(batch))
            end = time.perf_counter()
            for name, lap in zip(
                laps, (sampled - start, packed - sampled, end - packed), strict=True
            ):
                laps[name].append(lap)
            return report

        first, seconds = self._time(once)
        found = {"step_s": seconds, "first_step_s": first}
        found |= {f"{name}_s": statistics.median(lap[1:]) for name, lap in laps.items()}
        return found | self._memory()

    def _sample(self, lora: Tree) -> Rollout:
        weights = make_decode_weights(
            self.model, self.base, lora, self.plan, self.config.rollout.merge_lora
        )
        key = jax.random.key(self.config.seed)
        return self.generate(weights, self.prompts.tokens, self.prompts.mask, key)

    def _train_step(self) -> tuple[Callable[[TrainBatch], Any], list[TrainState]]:
        config = self.config
        train_step: TrainStep = make_train_step(
            self.model,
            config.grpo,
            config.rollout.temperature,
            config.rollout.max_completion_tokens,
            config.model.remat,
            self.optimizer,
            weight_grad_norms=config.weight_grad_norms,
        )
        # The step consumes its state, so what is kept is the newest.
        state = [init_train_state(jax.tree.map(jnp.array, self.lora), self.optimizer)]

        def step(batch: TrainBatch) -> Any:
            state[0], report = train_step(state[0], self.base, self.plan, batch)
            return report

        return step, state

    def _make_prompts(self) -> PromptBatch:
        shape = (self.config.grpo.prompts_per_step, self.config.bench.prompt_tokens)
        tokens = self.rng.integers(0, self.model.vocab_size, shape).astype(np.int32)
        names = [""] * shape[0]
        return PromptBatch(tokens, np.ones(shape, bool), names, names, list(range(shape[0])))

    def _lengths(self) -> np.ndarray:
        rows, cap = self.config.grpo.rows_per_step, self.config.rollout.max_completion_tokens
        if self.config.bench.lengths == "equal":
            return np.full(rows, cap, np.int32)
        sigma = 0.8
        drawn = self.rng.lognormal(
            np.log(self.config.bench.mean_tokens) - sigma**2 / 2, sigma, rows
        )
        return np.clip(drawn, 1, cap).astype(np.int32)

    def _completions(self, lengths: np.ndarray) -> Rollout:
        shape = (len(lengths), self.config.rollout.max_completion_tokens)
        mask = np.arange(shape[1])[None, :] < lengths[:, None]
        tokens = self.rng.integers(0, self.model.vocab_size, shape).astype(np.int32) * mask
        logprobs = np.where(mask, -np.log(self.model.vocab_size), 0.0).astype(np.float32)
        return Rollout(tokens, mask, logprobs, lengths, np.zeros(shape[0], np.int32))  # type: ignore[arg-type]

    def _batch(self, rollout: Rollout) -> TrainBatch:
        grpo = self.config.grpo
        lengths = np.asarray(rollout.lengths)
        rows, prompt_lengths = train_rows(self.prompts, rollout.tokens, lengths, grpo.group_size)
        advantages = self.rng.normal(size=len(rows)).astype(np.float32)
        completions = np.asarray(rollout.tokens)
        packed = pack_rows(
            rows, prompt_lengths, completions, lengths, group_size=grpo.group_size,
            micro_batches=grpo.micro_batches, shards=1, sizes=bin_sizes(),
        )  # fmt: skip
        mask = np.asarray(rollout.mask, np.float32)
        arrays = (rows, prompt_lengths, completions, mask, advantages, rollout.logprobs)
        if packed is None:
            return TrainBatch(*map(jnp.asarray, arrays))
        order, packing = packed
        arrays = (jnp.asarray(np.asarray(values)[order]) for values in arrays)
        return TrainBatch(*arrays, packing=jax.tree.map(jnp.asarray, packing))

    def _time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of the first run, and the median of the others."""
        start = time.perf_counter()
        jax.block_until_ready(run())
        first = time.perf_counter() - start
        seconds = []
        for _ in range(self.config.bench.repeats):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start)
        return first, statistics.median(seconds)

    def _memory(self) -> dict[str, float]:
        stats = jax.local_devices()[0].memory_stats()
        return {"peak_memory_gib": stats["peak_bytes_in_use"] / 2**30} if stats else {}

"""The memory that `plan --dry-run` foretells."""

import dataclasses

import pytest

from jaxgrpo import memory_estimate
from jaxgrpo.config_files import load_config
from jaxgrpo.model.presets import PRESETS
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.run import EMBEDDED_CONFIG

REFERENCE = (
    "data.max_prompt_tokens=128 data.prompt_bucket_tokens=128 rollout.max_completion_tokens=256 "
    "grpo.prompts_per_step=32 grpo.group_size=8 grpo.logprob_chunk_tokens=4096 lora.rank=16"
)


def estimate(*words):
    config = load_config([EMBEDDED_CONFIG], [*REFERENCE.split(), *words])
    model = dataclasses.replace(PRESETS["qwen2.5-1.5b"], dtype="bfloat16")
    return memory_estimate.estimate_memory(config, model, make_rank_plan(config.lora, 28))


def test_the_reference_step_takes_what_an_h200_was_seen_to_hold(monkeypatch):
    """46.2 GiB at `python -m jaxgrpo.run bench step` (docs/performance.md)."""
    monkeypatch.setattr(memory_estimate, "fuse_adapters", lambda: True)
    found = estimate("grpo.micro_batches=4", "model.remat=products")
    assert found["peak"] / 2**30 == pytest.approx(46.2, rel=0.1)


def test_where_groups_cannot_stay_together_every_row_has_its_prompt():
    apart, together = (
        estimate(f"grpo.micro_batches={parts}", "model.remat=full")["activations of a micro-batch"]
        for parts in (64, 32)
    )
    rows = {64: 4 * (128 + 256), 32: 128 + 8 * 256}
    assert apart / together == pytest.approx(rows[64] / rows[32])

"""What is foretold of a run's memory and of `model.remat`, by formula alone."""

import dataclasses

import pytest

from jaxgrpo.ahead.memory import foretell
from jaxgrpo.ahead.shapes import remat_of_run
from jaxgrpo.config_files import load_config
from jaxgrpo.devices import Device
from jaxgrpo.model.presets import PRESETS
from jaxgrpo.model.remat import kept_bytes_per_token
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.run import EMBEDDED_CONFIG

REFERENCE = (
    "data.max_prompt_tokens=128 data.prompt_bucket_tokens=128 rollout.max_completion_tokens=256 "
    "grpo.prompts_per_step=32 grpo.group_size=8 grpo.logprob_chunk_tokens=4096 lora.rank=16"
)
ONE = {"data": 1, "fsdp": 1, "model": 1}
H200 = Device("gpu", memory=int(0.75 * 141e9))


def reference(*words, device=H200):
    config = load_config([EMBEDDED_CONFIG], [*REFERENCE.split(), *words])
    return config, dataclasses.replace(PRESETS["qwen2.5-1.5b"], dtype="bfloat16", device=device)


def memory(*words, device=H200, sizes=ONE, arms=1):
    config, model = reference(*words, device=device)
    plan = make_rank_plan(config.lora, model.num_layers)
    return foretell(config, model, plan, sizes, remat_of_run(config, model, arms), arms)


@pytest.mark.parametrize(("bins", "gib"), [(4, 46.2), (8, 30.0)])
def test_the_reference_step_takes_what_an_h200_was_seen_to_hold(bins, gib):
    """`python -m jaxgrpo.run bench step` (docs/performance.md)."""
    found = memory(f"grpo.micro_batches={bins}", "model.remat=products")
    assert found.peak / 2**30 == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(("arms", "gib"), [(1, 23.1), (4, 27.7)])
def test_arms_together_take_what_an_h200_was_seen_to_hold(arms, gib):
    """`scripts/bench_arms.py configs/study_qwen.yaml --arms 4` (docs/performance.md): of four, what
    is sampled; rows that go on lie beside those that have ended while they are taken out."""
    words = ["data.max_prompt_tokens=256", "data.prompt_bucket_tokens=256"]
    words += ["rollout.max_completion_tokens=512", "grpo.micro_batches=24"]
    found = memory(*words, arms=arms)
    assert found.peak / 2**30 == pytest.approx(gib, rel=0.05)


def test_activations_go_with_the_places_of_a_bin():
    """Each prompt once for its group, whether or not groups divide over the micro-batches."""
    longest = 32 * 127 + 32 * 8 * 256
    for parts in (8, 24, 32):
        found = memory(f"grpo.micro_batches={parts}", "model.remat=full").train["activations kept"]
        assert found == pytest.approx(longest / parts * 28 * 1536 * 2, rel=5e-3)


def test_a_policy_that_keeps_less_is_foretold_to_need_less():
    found = [
        memory(f"model.remat={policy}", device=Device("tpu")).peak
        for policy in ("none", "products", "full")
    ]
    assert found == sorted(found, reverse=True) and len(set(found)) == 3


def test_more_devices_hold_less_each():
    """Keys' and values' projections, 2 % of the weights, are not split over `model`."""
    shapes = [ONE, {"data": 4, "fsdp": 1, "model": 1}, {"data": 2, "fsdp": 2, "model": 2}]
    found = [
        memory(
            "grpo.micro_batches=2",
            "model.remat=full",
            device=Device("tpu", count=data * fsdp * model, batch_shards=data * fsdp),
            sizes=sizes,
        )
        for sizes in shapes
        for data, fsdp, model in [sizes.values()]
    ]
    whole, rows_split, all_split = found
    assert rows_split.held == whole.held
    assert rows_split.rollout["key-value cache"] * 4 == whole.rollout["key-value cache"]
    assert all_split.held["frozen weights"] == pytest.approx(
        whole.held["frozen weights"] / 4, rel=0.02
    )


def remat(device, *words):
    config, model = reference(*words, device=device)
    return remat_of_run(config, model)


def test_auto_depends_on_the_tokens_of_one_device():
    """What eight devices share is an eighth for each, whoever asks and in whatever surroundings."""
    eighth = Device("tpu", count=8, batch_shards=8, memory=int(16e9))
    assert remat(dataclasses.replace(eighth, batch_shards=1)) == "full"
    assert remat(eighth) == "products"
    assert remat(eighth, "model.remat=full") == "full"


def test_a_device_that_does_not_tell_its_memory_recomputes():
    assert remat(Device("cpu")) == "full"


def test_on_one_gpu_products_may_take_what_the_rest_leaves():
    _, model = reference("grpo.micro_batches=4")
    kept = 8 * (128 + 8 * 256) * kept_bytes_per_token(model)
    half = Device("gpu", memory=int(2.0 * kept))
    assert remat(half, "grpo.micro_batches=4") == "products"
    # Two GPUs would have to leave half of it, and larger chunks of the head take their part.
    assert remat(dataclasses.replace(half, count=2), "grpo.micro_batches=4") == "full"
    assert remat(half, "grpo.micro_batches=4", "grpo.logprob_chunk_tokens=16384") == "full"

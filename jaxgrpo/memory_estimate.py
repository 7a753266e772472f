"""What a run will hold in device memory, by formula: for planning, not a promise."""

from __future__ import annotations

from jaxgrpo.config import Config
from jaxgrpo.model.pack_rows import bin_capacity
from jaxgrpo.model.presets import Qwen2Config
from jaxgrpo.model.remat import choose_remat, fuse_adapters, kept_bytes_per_token
from jaxgrpo.rank_plan import RankPlan


def estimate_memory(config: Config, model: Qwen2Config, plan: RankPlan) -> dict[str, int]:
    """What -> bytes over all devices together; "peak" is the larger of sampling and training.

    Assumes that whatever shards does: the frozen weights over fsdp and model, rows over data.
    """
    size = model.compute_dtype.itemsize
    layer_weights = model.num_parameters - model.vocab_size * model.hidden_size * (
        1 if model.tie_word_embeddings else 2
    )
    width = sum(sum(model.module_shapes[module]) for module in plan.modules)
    adapters = plan.layers * plan.max_rank * width
    prompts, rows = config.grpo.prompts_per_step, config.grpo.rows_per_step
    prompt = config.data.padded(config.data.max_prompt_tokens)
    completion = config.rollout.max_completion_tokens
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * size
    parts = config.grpo.micro_batches
    # Packed, a prompt is there once a group (`pack_rows`).
    tokens = rows // parts * (prompt + completion)
    if prompts % parts == 0:
        tokens, _ = bin_capacity(prompts // parts, config.grpo.group_size, prompt, completion)
    saved = kept_bytes(config, model, tokens)
    inside = tokens * (4 * model.hidden_size + 3 * model.intermediate_size)
    logits = 3 * config.grpo.logprob_chunk_tokens * model.vocab_size
    held = {
        "frozen weights": model.num_parameters * size,
        "adapters, gradient, AdamW": adapters * 4 * 4,
    }
    sampling = {
        "sampler's copy of the layers": layer_weights * size,
        "key-value cache": (prompts * prompt + rows * completion) * per_token,
    }
    training = {
        "activations of a micro-batch": saved + inside * size,
        "logits of a chunk, on each device": 4 * logits,
    }
    if fuse_adapters():
        training["frozen weights joined with adapters"] = (layer_weights + adapters) * size
    if config.weight_grad_norms:
        shapes = (model.module_shapes[module] for module in plan.modules)
        weights = model.num_layers * sum(ins * outs for ins, outs in shapes)
        training["gradient by the frozen weights"] = weights * 4
    peak = sum(held.values()) + max(sum(sampling.values()), sum(training.values()))
    return held | sampling | training | {"peak": peak}


def kept_bytes(config: Config, model: Qwen2Config, tokens: int) -> int:
    """What the forward pass of `tokens` tokens keeps for the backward pass, under model.remat."""
    remat = choose_remat(model, config.model.remat, tokens)
    if remat == "products":
        return tokens * kept_bytes_per_token(model)
    # Of a layer: its input alone, or about two dozen values of that size.
    size = model.hidden_size * model.compute_dtype.itemsize
    return tokens * model.num_layers * size * (1 if remat == "full" else 24)

"""Operations of a step, and the least time that decoding can take, by formula.

2 per multiply and add. Two counts of a train step are told apart: `train_hardware_flops` is what
the compiled program does (adapters, attention, what remat computes again), to hold programs
against; `train_model_flops` is what the model itself asks for, the usual numerator of a
utilisation. Norms, softmax and sampling are left out of both.
"""

from __future__ import annotations

from jaxgrpo.ahead.chips import Card
from jaxgrpo.ahead.shapes import full_bins, row_slots
from jaxgrpo.config import Config
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.sampler import TOGETHER
from jaxgrpo.rank_plan import RankPlan


def rollout_flops(config: Config, model: QwenConfig, plan: RankPlan, arms: int = 1) -> float:
    """Prefill of every prompt and a full decode of every completion, over all devices. Of attention
    all scores: plain attention computes the masked half too. Every row goes through the adapters
    of all arms that its device has."""
    prompts, rows = arms * config.grpo.prompts_per_step, arms * config.grpo.rows_per_step
    prompt, width = row_slots(config)
    carried = arms // model.device.arm_shards(arms) * carried_parameters(model, plan)
    layers = model.num_layers * (layer_parameters(model) + carried)
    head = head_parameters(model)
    attention = 4.0 * model.num_heads * model.head_dim * model.num_layers
    prefill = prompts * prompt * (2.0 * layers + attention * prompt)
    # The last token is drawn, and not fed again. Unwritten slots of the cache are attended too.
    steps = 2.0 * layers * (width - 1) + 2.0 * head * width
    return prefill + rows * (steps + attention * (width - 1) * (prompt + width))


def train_hardware_flops(
    config: Config, model: QwenConfig, plan: RankPlan, remat: str, arms: int = 1
) -> float:
    """Forward, backward and what `remat` computes again of rows that end at the cap, over all
    devices; of all arms."""
    model = model.of_arms(arms)
    shards, chunk = model.device.batch_shards, config.grpo.logprob_chunk_tokens
    shape = full_bins(config, model.device)
    bins = shape.bins * shards
    # Every place is computed and scored, and every row of a bin attends, whether used or not.
    tokens, rows, length = bins * shape.places, bins * shape.rows, shape.row_places
    scored = bins * -(-shape.places // chunk) * chunk
    shapes = model.module_shapes
    again = remat == "full"
    layers = layer_parameters(model)
    # Gradients by activations alone: the weights are frozen. The output of down_proj is not needed
    # again, so that product is not repeated.
    products = 4.0 * layers + (2.0 * (layers - _size(shapes["down_proj"])) if again else 0.0)
    adapters = sum(plan.max_rank * sum(shapes[m]) for m in plan.modules)
    low_rank = 6.0 * adapters + (2.0 * adapters if again else 0.0)
    if remat == "products":  # the inner values of adapters are not among what is kept
        low_rank += 2.0 * sum(plan.max_rank * shapes[m][0] for m in plan.modules)
    if config.weight_grad_norms:
        low_rank += 2.0 * sum(_size(shapes[m]) for m in plan.modules)
    attention = 4.0 * rows * length**2 * model.num_heads * model.head_dim
    # Forward, two backward; again the whole, or the scores alone.
    passes = 3 + {"full": 1.0, "products": 0.5}.get(remat, 0.0)
    head = 4.0 * head_parameters(model) * scored
    per_layer = tokens * (products + low_rank) + passes * attention
    return arms * (model.num_layers * per_layer + head)


def train_model_flops(config: QwenConfig, tokens: int, scored: int) -> float:
    """Forward and backward through the frozen matrices: 4 operations an entry and token, because
    only activations get a gradient. Attention and adapters are left out, as is usual."""
    layers = config.num_layers * layer_parameters(config) * tokens
    return 4.0 * (layers + head_parameters(config) * scored)


def decode_step_seconds(
    config: QwenConfig, card: Card, rows: int, prompts: int, prompt_tokens: float, own: float
) -> float:
    """One token for each of `rows`, each with `own` tokens so far; prompts are read once a
    group."""
    item = config.compute_dtype.itemsize

    def product(parameters: int) -> float:
        return max(parameters * item / card.bandwidth, 2 * parameters * rows / card.flops)

    seen = prompts * prompt_tokens + rows * own
    flops = 4 * config.num_heads * config.head_dim * rows * (prompt_tokens + own)
    attention = max(seen * kv_bytes(config) / card.bandwidth, flops / card.flops)
    layer = product(layer_parameters(config)) + attention
    return config.num_layers * layer + product(head_parameters(config))


def decode_seconds(
    config: QwenConfig, card: Card, prompts: int, group: int, prompt_tokens: int, width: int
) -> float:
    """All steps of completions of `width` tokens; the context grows by one each step."""
    own = (width - 1) / 2
    step = decode_step_seconds(config, card, prompts * group, prompts, prompt_tokens, own)
    return width * step


def layer_parameters(config: QwenConfig) -> int:
    """Entries of one layer's seven matrices."""
    return sum(i * o for i, o in config.module_shapes.values())


def carried_parameters(model: QwenConfig, plan: RankPlan) -> int:
    """Entries of the adapters that one layer of the sampler multiplies by: on one device those of
    one input are one matrix, zeros off its diagonal included."""
    shapes = model.module_shapes
    groups = [(module,) for module in shapes]
    if model.device.of_shard.count == 1:
        joined = [module for group in TOGETHER.values() for module in group]
        groups = [*TOGETHER.values(), *((module,) for module in shapes if module not in joined)]
    total = 0
    for group in groups:
        inner = plan.max_rank * sum(module in plan.modules for module in group)
        total += inner * (shapes[group[0]][0] + sum(shapes[module][1] for module in group))
    return total


def head_parameters(config: QwenConfig) -> int:
    return config.vocab_size * config.hidden_size


def kv_bytes(config: QwenConfig) -> int:
    """Keys and values of one token in one layer."""
    return 2 * config.num_kv_heads * config.head_dim * config.compute_dtype.itemsize


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]

"""Operations of a step by formula, to hold the compiled programs against.

2 per multiply and add. Projections, head, attention scores (all of them: plain attention computes
the masked half too) and adapters; norms, softmax and sampling are left out.
"""

from __future__ import annotations

from jaxgrpo.config import Config
from jaxgrpo.model.presets import Qwen2Config
from jaxgrpo.rank_plan import RankPlan


def rollout_flops(config: Config, model: Qwen2Config) -> float:
    """Prefill of every prompt and a full decode of every completion, over all devices."""
    prompts, rows = config.grpo.prompts_per_step, config.grpo.rows_per_step
    prompt, width = prompt_slots(config), config.rollout.max_completion_tokens
    layers = model.num_layers * sum(i * o for i, o in model.module_shapes.values())
    head = model.vocab_size * model.hidden_size
    attention = 4.0 * model.num_heads * model.head_dim * model.num_layers
    prefill = prompts * prompt * (2.0 * layers + attention * prompt)
    # The last token is drawn, and not fed again. Unwritten slots of the cache are attended too.
    steps = 2.0 * layers * (width - 1) + 2.0 * head * width
    return prefill + rows * (steps + attention * (width - 1) * (prompt + width))


def train_flops(config: Config, model: Qwen2Config, plan: RankPlan, remat: str) -> float:
    """Forward, backward and what `remat` computes again of rows that end at the cap, packed."""
    prompts, rows = config.grpo.prompts_per_step, config.grpo.rows_per_step
    prompt, width = prompt_slots(config), config.rollout.max_completion_tokens
    tokens, scored = prompts * prompt + rows * width, rows * width
    shapes = model.module_shapes
    again = remat == "full"
    layers = sum(i * o for i, o in shapes.values())
    # Gradients by activations alone: the weights are frozen. The output of down_proj is not needed
    # again, so that product is not repeated.
    products = 4.0 * layers + (2.0 * (layers - _size(shapes["down_proj"])) if again else 0.0)
    adapters = sum(plan.max_rank * sum(shapes[m]) for m in plan.modules)
    low_rank = 6.0 * adapters + (2.0 * adapters if again else 0.0)
    if remat == "products":  # the inner values of adapters are not among what is kept
        low_rank += 2.0 * sum(plan.max_rank * shapes[m][0] for m in plan.modules)
    if config.weight_grad_norms:
        low_rank += 2.0 * sum(_size(shapes[m]) for m in plan.modules)
    attention = 4.0 * rows * (prompt + width) ** 2 * model.num_heads * model.head_dim
    # Forward, two backward; again the whole, or the scores alone.
    passes = 3 + {"full": 1.0, "products": 0.5}.get(remat, 0.0)
    head = 4.0 * model.vocab_size * model.hidden_size * scored
    per_layer = tokens * (products + low_rank) + passes * attention
    return model.num_layers * per_layer + head


def prompt_slots(config: Config) -> int:
    """Tokens of the longest prompt, padded."""
    return config.data.padded(config.data.max_prompt_tokens)


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]

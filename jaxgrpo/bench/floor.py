"""The least time a phase can take: bytes over bandwidth or operations over rate, layer by layer.

Each part (one layer's matrices, its attention, the head) needs its bytes moved and its products
done; the slower of the two counts, and parts add up. Activations, norms and softmax are left out:
a perfect program would hide them.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxgrpo.model.presets import Qwen2Config


@dataclass(frozen=True)
class Device:
    """What a device can do, as measured on it.

    Attributes:
        bandwidth: bytes read and written per second, by a large copy.
        flops: bfloat16 operations per second, by a large matrix product on random data.
    """

    bandwidth: float
    flops: float


DEVICES = {
    "NVIDIA H200": Device(bandwidth=4.3e12, flops=790e12),
    "NVIDIA H100 80GB HBM3": Device(bandwidth=3.0e12, flops=780e12),
}
"""Known devices by `device_kind`; for others there is no floor to compare with."""


def layer_parameters(config: Qwen2Config) -> int:
    """Entries of one layer's seven matrices."""
    return sum(i * o for i, o in config.module_shapes.values())


def head_parameters(config: Qwen2Config) -> int:
    return config.vocab_size * config.hidden_size


def kv_bytes(config: Qwen2Config) -> int:
    """Keys and values of one token in one layer."""
    return 2 * config.num_kv_heads * config.head_dim * config.compute_dtype.itemsize


def decode_step_seconds(
    config: Qwen2Config, device: Device, rows: int, prompts: int, prompt_tokens: float, own: float
) -> float:
    """One token for each of `rows`, each with `own` tokens so far; prompts are read once a
    group."""
    item = config.compute_dtype.itemsize

    def product(parameters: int) -> float:
        return max(parameters * item / device.bandwidth, 2 * parameters * rows / device.flops)

    seen = prompts * prompt_tokens + rows * own
    flops = 4 * config.num_heads * config.head_dim * rows * (prompt_tokens + own)
    attention = max(seen * kv_bytes(config) / device.bandwidth, flops / device.flops)
    layer = product(layer_parameters(config)) + attention
    return config.num_layers * layer + product(head_parameters(config))


def decode_seconds(
    config: Qwen2Config, device: Device, prompts: int, group: int, prompt_tokens: int, width: int
) -> float:
    """All steps of completions of `width` tokens; the context grows by one each step."""
    own = (width - 1) / 2
    step = decode_step_seconds(config, device, prompts * group, prompts, prompt_tokens, own)
    return width * step


def train_flops(config: Qwen2Config, tokens: int, scored: int) -> float:
    """Forward and backward through the frozen matrices: 4 operations an entry and token, because
    only activations get a gradient. Attention and adapters are left out, as is usual."""
    layers = config.num_layers * layer_parameters(config) * tokens
    return 4.0 * (layers + head_parameters(config) * scored)

"""Gate and up in tiles: the same numbers as gate and up, in the sampler too."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import MODULES
from jaxgrpo.devices import Device
from jaxgrpo.model import gated_product
from jaxgrpo.model.api import init_base, init_lora
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.sampler import TOGETHER, beside, linear, tiles, under
from jaxgrpo.rank_plan import RankPlan

CORES = 132
"""Multiprocessors of an H100 and an H200."""


@pytest.mark.parametrize("features", [100, 128, 1])
def test_tiles_compute_what_two_products_do(features):
    x, gate, up = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(5, 48), (48, features), (48, features)])
    )
    laid = gated_product.make_tiles(gate, up, CORES)
    got = gated_product.gated_product(x, laid)
    assert got.shape == (5, gated_product.padded_width(features, CORES))
    want = jax.nn.silu(x @ gate) * (x @ up)
    chex.assert_trees_all_close(got[:, :features], want, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(got[:, features:], jnp.zeros_like(got[:, features:]))


@pytest.mark.parametrize(
    ("features", "half", "waves"), [(4864, 40, 1), (8960, 72, 1), (11008, 48, 2), (18944, 72, 2)]
)
def test_tiles_fill_the_card_in_few_waves(features, half, waves):
    assert gated_product.tile_width(features, CORES) == half
    assert -(-gated_product.padded_width(features, CORES) // half // CORES) == waves


def test_the_kernel_lowers_for_cuda():
    """As far as it goes without a GPU: Pallas takes it, layouts and memory included."""
    x = jax.ShapeDtypeStruct((gated_product.ROWS, 1536), jnp.bfloat16)
    tiles = jax.ShapeDtypeStruct((125, 2, 72, 1536), jnp.bfloat16)
    lowered = jax.jit(gated_product.gated_product).trace(x, tiles).lower(
        lowering_platforms=("cuda",)
    )  # fmt: skip
    assert "mosaic_gpu" in lowered.as_text()


def test_a_program_with_the_kernel_is_the_same_whatever_was_lowered_before():
    """Or it is another one to the programs that are kept on disk."""
    x = jax.ShapeDtypeStruct((gated_product.ROWS, 128), jnp.bfloat16)
    tiles = jax.ShapeDtypeStruct((2, 2, 32, 128), jnp.bfloat16)

    def lowered() -> str:
        # A jit of its own each time, as another program's: jax knows the first one's text.
        traced = jax.jit(lambda *given: gated_product.gated_product(*given)).trace(x, tiles)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    assert "mosaic_gpu" in lowered()
    assert lowered() == lowered()


@pytest.mark.parametrize("modules", [(), ("gate_proj", "down_proj"), MODULES])
def test_the_sampler_computes_the_same_with_tiles(modules):
    """In float32, adapters included; the padding is 0 and the next projection passes over it."""
    config = QwenConfig(64, 48, 100, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=12)
    layer = jax.tree.map(lambda x: x[0], init_base(config, jax.random.key(0))["layers"])
    ranks = RankPlan({module: np.array([3]) for module in modules or MODULES}, 3, 6.0, "rslora", 3)
    lora = jax.tree.map(lambda x: x[0] + 0.1, init_lora(config, ranks, jax.random.key(1)))
    adapters = {module: (lora[module]["a"], lora[module]["b"]) for module in modules}
    x = jax.random.normal(jax.random.key(2), (4, 48))
    plain = linear(config, x, under(layer, adapters, TOGETHER["gate_up"], 1))
    gate, up = jnp.split(plain, 2, axis=-1)
    want = jax.nn.silu(gate) * up
    tiled = tiles(layer, adapters, CORES)
    assert tiled.kernel.shape == (4, 2, 32, 48 + (16 if "gate_proj" in adapters else 0))
    got = linear(config, x, tiled)
    chex.assert_trees_all_close(got[:, :100], want, rtol=1e-5, atol=1e-6)
    assert not got[:, 100:].any()
    kernel, missing = layer["down_proj"]["kernel"], got.shape[1] - 100
    adapter = adapters.get("down_proj")
    down = beside(jnp.pad(kernel, ((0, missing), (0, 0))), adapter, missing)
    want = linear(config, want, beside(kernel, adapter))
    chex.assert_trees_all_close(linear(config, got, down), want, rtol=1e-5, atol=1e-6)


def test_only_one_hopper_with_bfloat16_has_tiles():
    config = QwenConfig(64, 48, 100, 1, 4, 2, 12, dtype="bfloat16")
    hopper = Device("gpu", capability="9.0")
    others = [Device("gpu", capability="8.0"), Device("gpu", count=2, capability="9.0"), Device()]
    assert gated_product.use_tiles(replace(config, device=hopper))
    assert not gated_product.use_tiles(replace(config, device=hopper, dtype="float32"))
    assert not any(gated_product.use_tiles(replace(config, device=d)) for d in others)

"""Gate and up in tiles: the same numbers as gate and up, in the sampler too."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import MODULES
from jaxgrpo.model import api, gated_product, sampler
from jaxgrpo.model.presets import Qwen2Config
from jaxgrpo.rank_plan import RankPlan


@pytest.mark.parametrize("features", [100, 128, 1])
def test_tiles_compute_what_two_products_do(features):
    x, gate, up = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(5, 48), (48, features), (48, features)])
    )
    tiles = gated_product.make_tiles(gate, up)
    got = gated_product.gated_product(x, tiles)
    assert got.shape == (5, gated_product.padded_width(features))
    want = jax.nn.silu(x @ gate) * (x @ up)
    chex.assert_trees_all_close(got[:, :features], want, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(got[:, features:], jnp.zeros_like(got[:, features:]))


@pytest.mark.parametrize(
    ("features", "half", "waves"), [(4864, 40, 1), (8960, 72, 1), (11008, 48, 2), (18944, 72, 2)]
)
def test_tiles_fill_the_card_in_few_waves(features, half, waves):
    assert gated_product.tile_width(features) == half
    assert -(-gated_product.padded_width(features) // half // 132) == waves


def test_the_kernel_lowers_for_cuda():
    """As far as it goes without a GPU: Pallas takes it, layouts and memory included."""
    x = jax.ShapeDtypeStruct((gated_product.ROWS, 1536), jnp.bfloat16)
    tiles = jax.ShapeDtypeStruct((125, 2, 72, 1536), jnp.bfloat16)
    lowered = jax.jit(gated_product.gated_product).trace(x, tiles).lower(
        lowering_platforms=("cuda",)
    )  # fmt: skip
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("modules", [(), ("gate_proj", "down_proj"), MODULES])
def test_the_sampler_computes_the_same_with_tiles(monkeypatch, modules):
    config = Qwen2Config(64, 48, 100, num_layers=2, num_heads=4, num_kv_heads=2)
    base = api.init_base(config, jax.random.key(0))
    lora = plan = None
    if modules:
        ranks = RankPlan({module: np.array([3, 1]) for module in modules}, 3, 6.0, "rslora", 3)
        lora = api.init_lora(config, ranks, jax.random.key(1))
        lora = jax.tree.map(lambda x: x + 0.1, lora)
        plan = api.device_plan(ranks)
    tokens, mask = jnp.arange(12).reshape(2, 6), jnp.ones((2, 6), bool)

    def run():
        api.make_decode_weights.clear_cache()
        weights = api.make_decode_weights(config, base, lora, plan)
        hidden, cache = api.prefill(config, weights, tokens, mask)
        own = api.init_completion_cache(config, 4, 8)
        newest, t = jnp.arange(4), jnp.int32(0)
        return weights, hidden, api.decode_step(config, weights, cache, mask, own, newest, t)

    _, *want = run()
    monkeypatch.setattr(sampler, "use_tiles", lambda dtype: True)
    weights, *got = run()
    api.make_decode_weights.clear_cache()
    inner = 16 if modules else 0
    assert weights["layers"][0]["gate_up"].kernel.shape == (4, 2, 32, 48 + inner)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)

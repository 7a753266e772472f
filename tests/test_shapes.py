"""The shapes in signatures are checked at every call of the suite, not only written down."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxgrpo.config import RolloutConfig
from jaxgrpo.grpo.advantages import compute_advantages
from jaxgrpo.model.qwen import swiglu
from jaxgrpo.rollout.sampling import sample


@pytest.mark.parametrize(
    "call",
    [
        lambda: compute_advantages(np.zeros((2, 2), np.float32), 2),
        lambda: swiglu(jnp.zeros((2, 4), jnp.int32)),
        # Logits of three rows, noise of two.
        lambda: sample(jnp.zeros((3, 8)), jnp.zeros((2, 1)), lambda rows: rows, RolloutConfig()),
    ],
    ids=["grpo", "model", "rollout"],
)
def test_a_wrong_shape_or_type_is_refused_where_it_is_given(call):
    with pytest.raises(TypeCheckError):
        call()

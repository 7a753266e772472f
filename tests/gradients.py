"""Closeness of gradients computed in another order of summation."""

import jax
import numpy as np


def assert_close_in_size(got, want, tolerance=1e-5):
    """Every leaf within `tolerance` of its size, the root of its sum of squares."""
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(mine - theirs) <= tolerance * np.linalg.norm(theirs)


def assert_gradients_close(got, want, tolerance=1e-4):
    """Every entry within `tolerance` of its leaf's largest.

    An entry is a sum over tokens of terms that mostly cancel; what the order of summation leaves
    in float32 goes with the terms, and so with the leaf's large entries, not with the entry.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a).all(), jax.tree_util.keystr(path)
        scale = np.abs(b).max()
        worst = np.abs(a - b).max()
        assert worst <= tolerance * scale, f"{jax.tree_util.keystr(path)}: {worst} of {scale}"

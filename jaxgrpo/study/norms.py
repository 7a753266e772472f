"""Gradient norms of a finished run, from its layer_grad_norms.jsonl. numpy only."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxgrpo.config import MODULES
from jaxgrpo.records.run_directory import read_jsonl


def read_norms(run_dir: Path, view: str) -> dict[str, np.ndarray] | None:
    """module -> [T, L]: each adapter's norm at each step, A and B as one (root of squares).

    None when the run did not measure that view.
    """
    path = Path(run_dir) / "layer_grad_norms.jsonl"
    if not path.is_file():
        return None
    records = sorted(read_jsonl(path), key=lambda record: record["step"])
    if not records or view not in records[0]:
        return None
    norms = {}
    for module in (m for m in MODULES if m in records[0][view]):
        parts = [
            np.sqrt(np.sum([np.square(x) for x in record[view][module].values()], axis=0))
            for record in records
        ]
        norms[module] = np.array(parts, np.float64)
    return norms


def layer_norms(norms: dict[str, np.ndarray]) -> np.ndarray:
    """[T, L]: a layer's norm is that of all its gradients together (root of squares)."""
    return np.sqrt(np.sum([np.square(x) for x in norms.values()], axis=0))


def importance(norms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """module -> [L]: the norms summed over the run (arXiv 2605.07366)."""
    return {module: values.sum(axis=0) for module, values in norms.items()}

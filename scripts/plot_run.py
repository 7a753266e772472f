"""Draws a run's reward, held-out accuracy and per-layer gradient norms as one picture.

python scripts/plot_run.py runs/embedded docs/embedded_run.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from jaxgrpo.records.run_directory import RunDirectory, read_jsonl


def layer_norms(run: RunDirectory) -> np.ndarray:
    """Root-sum-square over modules and matrices of each layer's gradient: [L, steps]."""
    columns = []
    for record in read_jsonl(run.layer_grad_norms):
        matrices = [np.asarray(m) for pair in record["l2"].values() for m in pair.values()]
        columns.append(np.sqrt(np.sum(np.square(matrices), axis=0)))
    return np.array(columns).T


def main() -> None:
    run, out = RunDirectory(Path(sys.argv[1])), Path(sys.argv[2])
    records = [r for r in read_jsonl(run.metrics) if "reward" in r]
    steps = [r["step"] for r in records]
    evaluations = [json.loads(path.read_text()) for path in sorted(run.eval.glob("step_*.json"))]
    at = [int(path.stem.split("_")[1]) for path in sorted(run.eval.glob("step_*.json"))]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(steps, [r["reward"] for r in records], color="#56b4e9", label="reward per step")
    accuracy = np.array([e["eval/accuracy"] for e in evaluations])
    bounds = np.array([[e["eval/accuracy_low"], e["eval/accuracy_high"]] for e in evaluations]).T
    left.errorbar(
        at,
        accuracy,
        yerr=np.abs(bounds - accuracy),
        fmt="o",
        color="#d55e00",
        capsize=4,
        label="held-out greedy accuracy, 95 % interval",
    )
    left.set(xlabel="step", ylim=(0, 1), title="reward and accuracy")
    left.legend(loc="lower right", frameon=False)
    norms = layer_norms(run)
    image = right.imshow(
        norms,
        aspect="auto",
        origin="lower",
        norm="log",
        extent=(0.5, norms.shape[1] + 0.5, -0.5, norms.shape[0] - 0.5),
    )
    right.set(xlabel="step", ylabel="layer", title="LoRA gradient norm per layer (L2)")
    figure.colorbar(image, ax=right)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()

"""Per-layer norms as a picture: a row per matrix, a column per layer. Floor 0: no jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxgrpo.config import MODULES

_ORDER = {module: place for place, module in enumerate(MODULES)}
MAX_DECADES = 4
"""What lies further below the largest is shown as the least: a zero would take the whole scale."""

LEFT, RIGHT, BOTTOM, TOP = 1.0, 0.9, 0.55, 0.4
"""For the names of the matrices, the colour scale, the layers and the title."""


def heat_map(norms: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> np.ndarray:
    """Norms, module -> matrix -> [L], as an RGB picture, uint8 [height, width, 3].

    The colour is logarithmic, since norms of layers differ by factors. What is no positive number
    stays white.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    modules = sorted(norms, key=lambda module: _ORDER.get(module, len(_ORDER)))
    rows = [(module, matrix) for module in modules for matrix in norms[module]]
    values = np.array([np.asarray(norms[module][side], float) for module, side in rows])
    values[~(np.isfinite(values) & (values > 0))] = np.nan
    layers = values.shape[1]
    # Margins in inches: a layout that measures every label takes longer than the drawing.
    wide, high = max(0.2 * layers, 2.4), max(0.2 * len(rows), 0.6)
    width, height = LEFT + wide + RIGHT, BOTTOM + high + TOP
    figure = Figure(figsize=(width, height))
    canvas = FigureCanvasAgg(figure)
    axes, bar = (
        figure.add_axes((left / width, BOTTOM / height, across / width, high / height))
        for left, across in ((LEFT, wide), (LEFT + wide + 0.12, 0.12))
    )
    known = values[np.isfinite(values)]
    most = known.max() if len(known) else 1.0
    least = max(known.min(initial=most), most / 10**MAX_DECADES)
    scale = LogNorm(least if least < most else most / 10, most, clip=True)
    image = axes.imshow(values, cmap="viridis", norm=scale, aspect="auto")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{module} {side}" for module, side in rows], fontsize=8)
    step = max(1, layers // 14)
    axes.set_xticks(range(0, layers, step), [str(x) for x in range(0, layers, step)], fontsize=8)
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

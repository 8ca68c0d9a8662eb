"""How a number is distributed over the rows, kept and not kept."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ftpipe.report.plots.style import COLOUR, NARROW, draw, place, thousands

HEIGHT, BINS = 190, 40


def histogram(kept: Any, dropped: Any, name: str, label: str, unit: str) -> Markup:
    """Stacked bars over 40 bins: rows kept at the bottom, those not kept above.

    Args:
        kept, dropped: numpy arrays of finite numbers; `dropped` may be empty.
        unit: what the axis measures. Values beyond the 0.5th and 99.5th percentile are counted in the outermost bins.
    """
    import numpy as np

    both = np.concatenate([kept, dropped])
    low, high = np.quantile(both, [0.005, 0.995])
    if not high > low:
        low, high = low - 0.5, high + 0.5
    whole = bool(np.all(both == np.round(both)))
    edges = np.unique(np.round(np.linspace(low, high, BINS + 1))) if whole and high - low >= 8 else np.linspace(low, high, BINS + 1)
    counts = [np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] for v in (kept, dropped)]

    def paint(figure: Any, width: int) -> None:
        axes = place(figure, width, HEIGHT, left=42, bottom=38)
        widths = np.diff(edges)
        style = {"align": "edge", "linewidth": 0.8, "edgecolor": COLOUR["surface"]}
        axes.bar(edges[:-1], counts[0], widths, color=COLOUR["adapter"], **style)
        if dropped.size:
            axes.bar(edges[:-1], counts[1], widths, bottom=counts[0], color=COLOUR["faint"], **style)
        axes.set_xlim(edges[0], edges[-1])
        axes.locator_params(axis="y", nbins=4)
        axes.locator_params(axis="x", nbins=6)
        thousands(axes.yaxis)
        axes.set_xlabel(unit)

    return draw(paint, NARROW, HEIGHT, name, label)

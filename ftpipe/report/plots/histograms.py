"""How a number is distributed over the rows, by what became of them."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ftpipe.report.plots.style import COLOUR, SMALL, draw, place, thousands

HEIGHT, BINS, SKEWED = 220, 40, 20


def histogram(groups: list[tuple[str, Any]], name: str, label: str, unit: str) -> Markup:
    """Bars over about 40 bins, the groups stacked from the bottom.

    Args:
        groups: (role of `COLOUR`, numpy array of finite numbers); arrays may be empty, not all of them.
        unit: what the axis measures. Values beyond the 0.5th and 99.5th percentile are counted in the outermost bins. Positive values whose range
            spans a factor of 20 or more above the 5th percentile get a logarithmic axis.
    """
    import numpy as np

    edges, log = _edges(np.concatenate([values for _, values in groups]))
    counts = [np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] for _, values in groups]

    def paint(figure: Any, width: int) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes = place(figure, width, HEIGHT, left=46, bottom=44)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.locator_params(axis="x", nbins=6)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1.05 * max(np.sum(counts, axis=0)))
        base = np.zeros(len(edges) - 1)
        for (role, _), heights in zip(groups, counts):
            axes.add_patch(_bars(edges, base, heights, COLOUR[role], log))
            base = base + heights
        axes.locator_params(axis="y", nbins=4, integer=True)
        thousands(axes.yaxis)
        axes.set_xlabel(unit)

    return draw(paint, SMALL, HEIGHT, name, label)


def _edges(values: Any) -> tuple[Any, bool]:
    """Edges of the bins, and whether they are even on a logarithmic axis. Whole numbers get bins of equal whole width."""
    import numpy as np

    low, high = np.quantile(values, [0.005, 0.995])
    if not high > low:
        return np.linspace(low - 0.5, low + 0.5, BINS + 1), False
    if low > 0 and high / np.quantile(values, 0.05) >= SKEWED:
        return np.geomspace(low, high, BINS + 1), True
    if np.all(values == np.round(values)):
        step = max(int(np.ceil((high - low + 1) / BINS)), 1)
        return np.arange(np.floor(low) - 0.5, high + 0.5 + step, step), False
    return np.linspace(low, high, BINS + 1), False


def _bars(edges: Any, base: Any, heights: Any, colour: str, log: bool) -> Any:
    """All bars of a group as one path, with a little air between them."""
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    left, right = edges[:-1], edges[1:]
    air = 0.08 * (np.log(right / left) if log else right - left)
    left, right = (left * np.exp(air), right * np.exp(-air)) if log else (left + air, right - air)
    full = heights > 0
    left, right, low, high = left[full], right[full], base[full], (base + heights)[full]
    corners = np.stack([np.stack(p, axis=-1) for p in ((left, low), (left, high), (right, high), (right, low), (left, low))], axis=1).reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], int(full.sum()))
    path = Path(corners, codes)
    path.should_simplify = False
    return PathPatch(path, facecolor=colour, edgecolor="none", linewidth=0)

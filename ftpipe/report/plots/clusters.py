"""The rows on a plane, by cluster, with those that were sampled."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ftpipe.report.plots.style import COLOUR, both, place

HUES = 8


def scatter(x: Any, y: Any, cluster: Any, sampled: Any, name: str, label: str) -> Markup:
    """Pale dots for the rows passed over, full ones for the rows sampled; eight hues that repeat over the clusters.

    Dots of one look are one path of zero-length strokes with round caps: 5,000 of them take about 120 kB rather than a megabyte.
    """
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    size = 1.0 if len(x) > 500 else 1.6
    span = np.ptp(x) or 1.0, np.ptp(y) or 1.0

    def height(width: int) -> int:
        return 480 if width > 500 else 330

    def paint(figure: Any, width: int) -> None:
        axes = place(figure, width, height(width), left=4, right=4, top=4, bottom=4)
        axes.set_axis_off()
        axes.set_xlim(x.min() - 0.03 * span[0], x.max() + 0.03 * span[0])
        axes.set_ylim(y.min() - 0.03 * span[1], y.max() + 0.03 * span[1])
        for picked in (False, True):
            for hue in range(HUES):
                these = (cluster % HUES == hue) & (sampled == picked)
                if not these.any():
                    continue
                points = np.repeat(np.column_stack([x[these], y[these]]), 2, axis=0)
                codes = np.tile([Path.MOVETO, Path.LINETO], int(these.sum()))
                path = Path(points, codes)
                path.should_simplify = False  # it would take strokes of no length away
                axes.add_patch(PathPatch(path, fill=False, edgecolor=COLOUR[f"c{hue}"], capstyle="round",
                                         linewidth=size * (4.2 if picked else 2.6), alpha=1 if picked else 0.28))

    return both(paint, height, name, label)

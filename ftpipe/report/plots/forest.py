"""Differences with their intervals on one axis."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ftpipe.report.plots.style import COLOUR, NARROW, both, name_row, place

ROW, ROW_NARROW, AXIS, LEFT = 34, 44, 48, 270


def forest(entries: list[dict[str, Any]], name: str, label: str, unit: str) -> Markup:
    """A forest plot.

    Args:
        entries: each with label, difference, low, high (None where it is unbounded), and colour (a role of `COLOUR`). Positive is better.
        unit: what the axis measures.
    """

    def height(width: int) -> int:
        return (ROW if width > NARROW else ROW_NARROW) * len(entries) + AXIS

    def paint(figure: Any, width: int) -> None:
        wide = width > NARROW
        axes = place(figure, width, height(width), left=LEFT if wide else 10, right=16, top=4, bottom=AXIS)
        ends = [0.0] + [v for e in entries for v in (e["low"], e["high"], e["difference"]) if v is not None]
        pad = 0.08 * ((max(ends) - min(ends)) or 1)
        axes.set_xlim(min(ends) - pad, max(ends) + pad)
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.axvline(0, color=COLOUR["muted"], linewidth=1)
        axes.grid(axis="x")
        axes.grid(False, axis="y")
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks([])
        for y, e in enumerate(entries):
            colour = COLOUR[e["colour"]]
            at = y if wide else y + 0.2
            span = [end if value is None else value for value, end in zip((e["low"], e["high"]), axes.get_xlim())]
            axes.plot(span, [at, at], color=colour, linewidth=2.2)
            axes.plot([e["difference"]], [at], marker="o", markersize=6, color=colour, markeredgecolor=COLOUR["surface"], markeredgewidth=1)
            name_row(axes, y, e["label"], LEFT / (width - LEFT - 16) if wide else None)
        axes.set_xlabel(unit)

    return both(paint, height, name, label)

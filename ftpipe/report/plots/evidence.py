"""Plots that a diagnostic handed over as data: numbers over numbers, and values by name."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ftpipe.report.plots.style import COLOUR, NARROW, SMALL, both, draw, name_row, place
from ftpipe.report.text import brief

HEIGHT, ROW, ROW_NARROW, AXIS, LEFT = 270, 28, 44, 48, 270
MARKS = ("o", "D", "s", "^", "v", "P", "X", "*")


def chart(plot: dict[str, Any], colours: dict[str, str], name: str) -> Markup:
    """The drawing of a `Chart` (see `evaluate/diagnostics/base.py`). colours: the role of each series that is no guide."""

    def paint(figure: Any, width: int) -> None:
        axes = place(figure, width, HEIGHT, left=58, right=14, top=10, bottom=44)
        for series in plot["series"]:
            if series["guide"]:
                axes.plot(series["x"], series["y"], color=COLOUR["faint"], linewidth=1.2, linestyle=(0, (3, 2)))
                continue
            mark = MARKS[list(colours).index(series["name"]) % len(MARKS)]
            axes.plot(series["x"], series["y"], color=COLOUR[colours[series["name"]]], linewidth=1.6 if series["joined"] else 0, marker=mark, markersize=5,
                      markeredgecolor=COLOUR["surface"], markeredgewidth=0.8)
        if plot["span"]:
            low, high = plot["span"]
            pad = 0.03 * (high - low)
            axes.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
        else:
            axes.margins(x=0.08, y=0.1)
        axes.locator_params(nbins=5)
        axes.set_xlabel(brief(plot["x"], 60))
        axes.set_ylabel(brief(plot["y"], 44))

    return draw(paint, SMALL, HEIGHT, name, plot["title"])


def dots(plot: dict[str, Any], colours: dict[str, str], name: str) -> Markup:
    """The drawing of `Dots`: a line for each name, on a phone with the name above it."""
    count = len(plot["names"])

    def height(width: int) -> int:
        return (ROW if width > NARROW else ROW_NARROW) * count + AXIS

    def paint(figure: Any, width: int) -> None:
        wide = width > NARROW
        axes = place(figure, width, height(width), left=LEFT if wide else 10, right=16, top=4, bottom=AXIS)
        values = [v for each in plot["series"].values() for v in each if v is not None] or [0.0]
        ends = [*values, 0.0] if plot["zero"] else values
        pad = 0.08 * ((max(ends) - min(ends)) or 1)
        axes.set_xlim(min(ends) - pad, max(ends) + pad)
        axes.set_ylim(count - 0.4, -0.6)
        axes.grid(axis="x")
        axes.grid(False, axis="y")
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks([])
        if plot["zero"]:
            axes.axvline(0, color=COLOUR["muted"], linewidth=1)
        drop = 0.0 if wide else 0.2
        for y in range(count):
            axes.axhline(y + drop, color=COLOUR["grid"], linewidth=0.8, zorder=0)
            name_row(axes, y, brief(plot["names"][y], 44), LEFT / (width - LEFT - 16) if wide else None)
        step = (0.16 if wide else 0.1) if len(colours) > 1 else 0.0  # so that equal values do not hide each other
        for n, (series, role) in enumerate(colours.items()):
            aside = drop + step * (n - (len(colours) - 1) / 2)
            points = [(v, y + aside) for y, v in enumerate(plot["series"][series]) if v is not None]
            axes.plot([v for v, _ in points], [y for _, y in points], linewidth=0, marker=MARKS[n % len(MARKS)], markersize=6, color=COLOUR[role],
                      markeredgecolor=COLOUR["surface"], markeredgewidth=1)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(brief(plot["unit"], 60))

    return both(paint, height, name, plot["title"])

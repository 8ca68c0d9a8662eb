"""What training did, step by step."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ftpipe.report.plots.style import COLOUR, SMALL, both, draw, place, thousands

HEIGHT = 300


def losses(curves: list[dict[str, Any]], name: str, label: str) -> Markup:
    """Training loss over trained tokens: each step faint, its running mean strong.

    Args:
        curves: each with name, colour (a role), x, y and smooth: numpy arrays of one length.
    """

    def paint(figure: Any, width: int) -> None:
        axes = place(figure, width, HEIGHT, left=44, right=24, bottom=44)
        for c in curves:
            axes.plot(c["x"], c["y"], color=COLOUR[c["colour"]], linewidth=0.8, alpha=0.35)
        for c in curves:
            axes.plot(c["x"], c["smooth"], color=COLOUR[c["colour"]], linewidth=2)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=8 if width > 500 else 5)
        thousands(axes.xaxis)
        axes.set_xlabel("trained tokens")

    return both(paint, HEIGHT, name, label)


def line(curves: list[dict[str, Any]], name: str, label: str, unit: str) -> Markup:
    """A small plot of one column of the metrics, one line for each training; see `losses`."""
    height = 190

    def paint(figure: Any, width: int) -> None:
        axes = place(figure, width, height, left=52, right=10, bottom=44)
        for n, c in enumerate(curves):
            axes.plot(c["x"], c["y"], color=COLOUR[c["colour"]], linewidth=1.6, linestyle="--" if n else "-")  # equal ones stay visible
        axes.locator_params(axis="y", nbins=4)
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.set_xlabel(unit)

    return draw(paint, SMALL, height, name, label)

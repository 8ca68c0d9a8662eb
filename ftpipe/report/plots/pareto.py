"""Quality against what it cost, one small plot for each kind of cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from ftpipe.report.plots.style import COLOUR, SMALL, draw, place

HEIGHT = 260


def pareto(points: list[dict[str, Any]], name: str, label: str, x_unit: str, y_unit: str, write: Callable[[float], str]) -> Markup:
    """Points with intervals, and a line through those that none is better than both ways.

    Args:
        points: each with label, colour (a role), x (lower is better), y, low, high (higher is better).
        write: how a number on the x axis is written.
    """

    def paint(figure: Any, width: int) -> None:
        axes = place(figure, width, HEIGHT, left=72, right=28, top=10, bottom=44)
        front = frontier(points)
        if len(front) > 1:
            axes.plot([p["x"] for p in front], [p["y"] for p in front], color=COLOUR["faint"], linewidth=1.4, drawstyle="steps-post")
        for p in points:
            colour = COLOUR[p["colour"]]
            axes.plot([p["x"], p["x"]], [p["low"], p["high"]], color=colour, linewidth=1.6)
            axes.plot([p["x"]], [p["y"]], marker="o", markersize=6, color=colour, markeredgecolor=COLOUR["surface"], markeredgewidth=1)
        axes.axhline(0, color=COLOUR["muted"], linewidth=0.8)
        axes.margins(x=0.12, y=0.12)
        least, most = (pick(p["x"] for p in points) for pick in (min, max))
        if least >= 0:
            axes.set_xlim(left=-0.03 * (most or 1))
        else:
            axes.axvline(0, color=COLOUR["muted"], linewidth=0.8)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda value, _: write(value))
        axes.set_xlabel(x_unit)
        axes.set_ylabel(y_unit)

    return draw(paint, SMALL, HEIGHT, name, label)


def frontier(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other one beats or equals in both x (low) and y (high) and beats in one, by ascending x."""
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["x"], -p["y"])):
        if not found or point["y"] > found[-1]["y"]:
            found.append(point)
    return found

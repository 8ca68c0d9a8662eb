"""How every plot is drawn: small figures with real text, coloured by the page's style sheet, the same bytes for the same data.

matplotlib writes colours and fonts into the SVG. Here each role (ink, grid, first series, ...) is drawn in a sentinel colour that is then replaced by
a CSS variable, so that one drawing follows the page into dark mode and onto paper. Ids get a prefix: several drawings share one document.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

ROLES = ("ink", "muted", "grid", "surface", "base", "adapter", "control", "control2", "champion", "good", "bad", "faint", "dropped",
         "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7")
COLOUR = {role: f"#0d0b{i:02x}" for i, role in enumerate(ROLES)}
"""Sentinel colours: what to hand to matplotlib for a role."""

WIDE, NARROW, SMALL = 912, 358, 430
"""Widths in CSS pixels that figures are drawn for: the page, a phone, and half the page. Text keeps its size in all."""

FONT = 12.5
_PIXEL = 72 / 96
_SENTINEL = re.compile(r"#0d0b([0-9a-f]{2})")
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "ftpipe",
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "font.size": FONT * _PIXEL, "axes.labelsize": FONT * _PIXEL, "xtick.labelsize": FONT * _PIXEL, "ytick.labelsize": FONT * _PIXEL,
    "text.color": COLOUR["ink"], "axes.labelcolor": COLOUR["muted"], "xtick.color": COLOUR["muted"], "ytick.color": COLOUR["muted"],
    "axes.edgecolor": COLOUR["grid"], "grid.color": COLOUR["grid"], "axes.grid": True, "axes.grid.axis": "y", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.linewidth": 0.8,
    "xtick.major.size": 3, "xtick.major.width": 0.6, "ytick.major.size": 0, "xtick.major.pad": 3, "ytick.major.pad": 4,
    "lines.solid_capstyle": "round", "axes.unicode_minus": True, "axes.xmargin": 0.01, "path.simplify": True,
}


def draw(paint: Callable[[Any, int], None], width: int, height: int, name: str, label: str) -> Markup:
    """One SVG element.

    Args:
        paint: called with the matplotlib figure and the width; adds axes and draws.
        width, height: size in CSS pixels; text is drawn at the page's size.
        name: unique in the page; prefix of the ids inside.
        label: what the plot shows, for readers who cannot see it.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(width / 96, height / 96))
        FigureCanvasSVG(figure)
        paint(figure, width)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_inline(buffer.getvalue(), width, height, name, label))


def both(paint: Callable[[Any, int], None], height: int | Callable[[int], int], name: str, label: str) -> Markup:
    """The plot drawn twice, for a wide page and for a phone; the style sheet shows one of them."""
    parts = []
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        tall = height(width) if callable(height) else height
        parts.append(Markup('<div class="{}">{}</div>').format(kind, draw(paint, width, tall, f"{name}-{kind[0]}", label)))
    return Markup("").join(parts)


def place(figure: Any, width: int, height: int, *, left: float = 44, right: float = 8, top: float = 8, bottom: float = 24) -> Any:
    """Axes with margins in CSS pixels."""
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))


def name_row(axes: Any, y: float, text: str, margin: float | None) -> None:
    """Write the name of row `y`: at the left of a margin so many times as wide as the axes, or, without one, above its line, hiding what is behind."""
    ground = None if margin else {"facecolor": COLOUR["surface"], "edgecolor": "none", "pad": 1.5}
    axes.text(-margin if margin else 0, y if margin else y - 0.2, text, transform=axes.get_yaxis_transform(), va="center", ha="left", color=COLOUR["ink"],
              bbox=ground)


def thousands(axis: Any) -> None:
    """Whole numbers with separators on an axis."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def roles(names: list[str], controls: list[str]) -> dict[str, str]:
    """The role of `COLOUR` for each series: a system has the same on the whole page, whatever else there is gets one of its own while they last."""
    own = {"base": "base", "adapter": "adapter", "champion": "champion"} | dict(zip(controls, ("control", "control2")))
    free = [f"c{i}" for i in (3, 4, 7, 6, 5, 1, 0, 2)]
    others = [n for n in names if n not in own]
    return {n: own.get(n) or free[others.index(n) % len(free)] for n in names}


def _inline(svg: str, width: int, height: int, name: str, label: str) -> str:
    """The drawing as an element of an HTML page: no prolog, no metadata, no style element, unique ids, colours and fonts from the page."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r"\bid=\"([^\"]+)\"", rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"xlink:href=\"#([^\"]+)\"", rf'href="#{name}-\1"', svg)
    svg = re.sub(r"font: (?:\S+ )*?([\d.]+)px [^;\"]+", r"font: \1px var(--sans)", svg)
    svg = re.sub(r" id=\"[^\"]*-(?:figure|axes|patch|matplotlib\.axis|xtick|ytick|line2d|text|PathCollection|LineCollection|FillBetween\w*)_\d+\"", "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d{2})\d+", r"\1", tag.group()), svg)  # in paths, not in the text of tick labels
    svg = _SENTINEL.sub(lambda m: f"var(--{ROLES[int(m.group(1), 16)]})", svg)
    head = f'<svg viewBox="0 0 {width * _PIXEL:g} {height * _PIXEL:g}" width="{width}" height="{height}" role="img" aria-label="{_attribute(label)}">'
    return head + svg[svg.index(">") + 1:].strip()


def _attribute(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))

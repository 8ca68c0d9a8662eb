"""Plots and tables of diagnostics: the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


def svg(draw: Callable[[Any], None], *, width: float = 5, height: float = 3) -> str:
    """The SVG text of one pair of axes that `draw` fills; sizes in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "ftpipe", "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def table(columns: dict[str, str], rows: list[tuple]) -> Any:
    """An Arrow table of rows; `columns` gives each column's name and Arrow type."""
    import pyarrow as pa

    types = [pa.type_for_alias(t) for t in columns.values()]
    return pa.table({name: pa.array([r[i] for r in rows], t) for i, (name, t) in enumerate(zip(columns, types))})

"""The page: its sections in order, put together by templates that escape everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftpipe import __version__
from ftpipe.report.collect import RunData
from ftpipe.report.sections import audit, comparison, data, diagnostics, examples, headline, lineage, rows, scores, study, training
from ftpipe.report.text import breakable, brief, whole

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    ("study", "Study", "Side by side", study.build),
    ("data", "Data", "What the rows are like", data.build),
    ("comparison", "Comparison", "Is it better?", comparison.build),
    ("diagnostics", "Diagnostics", "What else was looked at", diagnostics.build),
    ("funnel", "Rows", "What became of the rows", rows.build),
    ("scores", "Scores", "How the rows scored", scores.build),
    ("training", "Training", "Training", training.build),
    ("examples", "Examples", "Answers before and after", examples.build),
    ("audit", "Label audit", "What is trained on", audit.build),
    ("lineage", "Lineage", "Where it came from", lineage.build),
)
"""Template and anchor, name in the navigation, heading, and what builds it."""


def render(run: RunData, title: str | None = None) -> str:
    """The whole page as HTML: one file, nothing loaded from anywhere, no scripts. The same artifacts give the same text."""
    from markupsafe import Markup

    sections = [{"id": name, "short": short, "title": heading, "data": data}
                for name, short, heading, build in SECTIONS if (data := build(run)) is not None]
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    title = title or (f"{run.pipeline} · ftpipe" if run.pipeline else "ftpipe")
    return _environment().get_template("page.html").render(title=title, version=__version__, style=style, headline=headline.build(run), sections=sections)


def templates_digest() -> dict[str, str]:
    """SHA-256 of each template and style sheet; they decide the page as much as the code does."""
    from ftpipe.canonical import file_digest

    return {p.name: file_digest(p) for p in sorted(TEMPLATES.glob("*")) if p.suffix in (".html", ".css")}


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                       finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else brief(value))
    environment.filters |= {"breakable": breakable, "whole": whole}
    return environment

"""Artifacts for the UI. Publishing is a courtesy: what goes wrong is logged and never fails a run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import Any

from prefect.logging import get_run_logger

from ftpipe.artifacts import Artifact

ROWS_SHOWN = 200


def slug(text: str) -> str:
    """A key of an artifact: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


@contextmanager
def impatient(tries: int = 3) -> Iterator[None]:
    """Ask a server that is away only so many times more, after 2, 4, 8 ... seconds; how a run went is worth waiting for, a picture of it is not."""
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: min(tries, PREFECT_CLIENT_MAX_RETRIES.value())}):
        yield


def courteous(publish: Callable[..., None]) -> Callable[..., None]:
    """Turn every exception of `publish` into a warning, and do not wait for long."""

    @wraps(publish)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with impatient():
                publish(*args, **kwargs)
        except Exception as error:
            get_run_logger().warning("an artifact for the UI could not be published: %s: %s", type(error).__name__, error)

    return wrapped


@courteous
def markdown(key: str, text: str, description: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(markdown=text, key=slug(key), description=description)


@courteous
def table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    """A table artifact; each row a dict with the same keys. Long ones are cut."""
    from prefect.artifacts import create_table_artifact

    if len(rows) > ROWS_SHOWN:
        description += f" (the first {ROWS_SHOWN} of {len(rows)})"
    create_table_artifact(table=[{k: _plain(v) for k, v in row.items()} for row in rows[:ROWS_SHOWN]], key=slug(key), description=description)


@courteous
def link(key: str, url: str, text: str, description: str) -> None:
    from prefect.artifacts import create_link_artifact

    create_link_artifact(link=url, link_text=text, key=slug(key), description=description)


@courteous
def publish(pipeline: str, artifact: Artifact) -> None:
    """Show what a finished stage made, if there is a `tasks/<kind>.py` that knows how; a step that judged rows is shown as a funnel."""
    module = f"tasks.{artifact.kind}"
    if find_spec(module) is None or not hasattr(importlib.import_module(module), "show"):
        if "rows_in" not in artifact.counts:
            return
        module = "tasks.curate"
    importlib.import_module(module).show(f"{pipeline}-{artifact.name}", artifact)


def funnel(artifact: Artifact) -> list[dict[str, Any]]:
    """Rows in, kept and dropped by reason, most first."""
    counts, n = artifact.counts, artifact.counts.get("rows_in", 0)
    parts = [("in", n), ("kept", counts.get("rows_kept", 0))]
    parts += sorted(((name, value) for name, value in counts.items() if name.startswith("dropped: ")), key=lambda p: (-p[1], p[0]))
    return [{"rows": name, "count": value, "share": f"{value / n:.1%}" if n else ""} for name, value in parts]


def number(value: Any, digits: int = 4) -> str:
    """A number for a table; a dash for what is missing."""
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

"""`ftpipe methods`: everything that can be named in a pipeline file."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ftpipe.cli._app import Json, app


@app.command()
def methods(
    slot: Annotated[str | None, typer.Argument(help="Only this slot and those below it, such as `curate` or `train/adapt`.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List all methods with slot, paper, settings and what they need."""
    listed = inventory(slot)
    if as_json:
        typer.echo(json.dumps(listed, indent=1, ensure_ascii=False))
        return
    from rich.table import Table

    from ftpipe.cli._console import console

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("slot", "method", "what it does", "needs", "paper"):
        table.add_column(column, overflow="fold")
    for m in listed:
        table.add_row(m["slot"], m["name"], m["summary"], ", ".join(m["needs"]), "; ".join(m["paper"]))
    console.print(table)


def inventory(only: str | None = None) -> list[dict[str, Any]]:
    """One entry per method: name, slot, paper (titles), summary, needs, settings (JSON Schema of each field)."""
    from ftpipe import slots
    from ftpipe.errors import ConfigError, nearest

    found = slots.slots()
    chosen = [s for s in found.values() if only is None or s.name == only or s.name.startswith(only + "/")]
    if not chosen:
        raise ConfigError(f"no slot {only!r}", remedy=nearest(only or "", found))
    listed = []
    for slot in chosen:
        for name in slot.names():
            cls = slot.get(name)
            titles = [cls.paper] if isinstance(cls.paper, str) else list(cls.paper or ())
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            settings = cls.model_json_schema().get("properties", {})
            listed.append({"name": name, "slot": slot.name, "paper": titles, "summary": summary, "needs": list(cls.needs), "settings": settings})
    return listed

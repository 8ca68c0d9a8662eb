"""`ftpipe gc`: free the space of what nothing refers to."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app


@app.command()
def gc(
    days: Annotated[float, typer.Option(min=0, help="Leave alone what was written in the last DAYS days.")] = 7.0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it; without this the list is only shown.")] = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Json = False,
) -> None:
    """List artifacts that no pipeline, run or registered version refers to, and what unfinished stages left; with --yes remove them.

    Nothing that an alias or a lineage refers to is touched. Removing an artifact costs at most the time to make it again."""
    from rich.table import Table

    from ftpipe.cli._console import console
    from ftpipe.pipeline.garbage import find, remove
    from ftpipe.report.numbers import size

    found = find(workspace, days=days)
    freed = remove(workspace, found) if yes else 0
    if as_json:
        typer.echo(json.dumps({"found": [{"path": str(g.path), "bytes": g.bytes, "reason": g.reason} for g in found], "freed": freed}, indent=1))
        return
    if not found:
        console.print(f"nothing to remove in {workspace}")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("size", "folder", "why"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for g in found:
        table.add_row(size(g.bytes), str(g.path.relative_to(workspace)), g.reason)
    console.print(table)
    console.print(f"\n{size(freed)} freed" if yes else f"\n{size(sum(g.bytes for g in found))} can be freed: ftpipe gc --yes")

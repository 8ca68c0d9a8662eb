"""`ftpipe which`: the adapters that saw a row."""

from __future__ import annotations

import json

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app
from ftpipe.cli.why import Row


@app.command()
def which(row: Row, workspace: Workspace = DEFAULT_WORKSPACE, as_json: Json = False) -> None:
    """List the adapters that were trained on a row, how often they saw it, and the versions that they are registered as."""
    from ftpipe.pipeline.lineage import which as ask

    answer = ask(workspace, row)
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
    else:
        show(answer)


def show(answer: list[dict]) -> None:
    """The adapters as a table."""
    from rich.table import Table

    from ftpipe.cli._console import console

    if not answer:
        console.print("no adapter in this workspace was trained on it")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("adapter", "key", "made", "saw it", "registered as"):
        table.add_column(column, overflow="fold")
    for a in answer:
        saw = f"through {a['kind']}" if a["times"] is None else f"{a['times']} time{'s' if a['times'] != 1 else ''}"
        table.add_row(a["stage"], a["key"][:12], (a["made"] or "")[:19], saw, ", ".join(a["versions"]))
    console.print(table)

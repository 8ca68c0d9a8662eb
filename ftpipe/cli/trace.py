"""`ftpipe trace`: the rows that made an adapter."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app


@app.command()
def trace(
    adapter: Annotated[str, typer.Argument(help="Registered NAME, NAME@VERSION or NAME@ALIAS, a training stage, or an artifact key.", show_default=False)],
    limit: Annotated[int, typer.Option(min=1, help="How many rows to print.")] = 20,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Json = False,
) -> None:
    """List the rows that made an adapter: where each came from and how often it was seen."""
    from ftpipe.pipeline.lineage import trace as ask

    answer = ask(workspace, adapter)
    if as_json:
        typer.echo(json.dumps(answer, indent=1, ensure_ascii=False))
        return
    from rich.table import Table
    from rich.text import Text

    from ftpipe.cli._console import console

    console.print(f"{answer['stage']} {answer['key'][:12]}: {len(answer['rows']):,} rows, seen {sum(r['times'] for r in answer['rows']):,} times")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("row", "times", "source", "group", "text"):
        table.add_column(column, no_wrap=column == "row", overflow="ellipsis" if column == "text" else "fold")
    for r in answer["rows"][:limit]:
        told = (f"{r['source']}:{r['line']}", r["group"], r["text"][:80].replace("\n", " "))
        table.add_row(r["row_id"][:12], str(r["times"]), *map(Text, told))
    console.print(table)
    if len(answer["rows"]) > limit:
        console.print(f"... {len(answer['rows']) - limit:,} more; --json prints them all")

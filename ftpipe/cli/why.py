"""`ftpipe why`: what every step decided about a row."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app

Row = Annotated[str, typer.Argument(help="Row id or its beginning (8 digits or more).", show_default=False)]


@app.command()
def why(
    row: Row,
    workspace: Workspace = DEFAULT_WORKSPACE,
    pipeline: Annotated[str | None, typer.Option(help="Only this pipeline.")] = None,
    as_json: Json = False,
) -> None:
    """Say what every step decided about a row, with which score, for which reason, and which row it duplicates."""
    from ftpipe.pipeline.lineage import why as ask

    answer = ask(workspace, row, pipeline)
    if as_json:
        typer.echo(json.dumps(answer, indent=1, ensure_ascii=False))
        return
    from rich.markup import escape
    from rich.table import Table

    from ftpipe.cli._console import console

    for found in answer:
        where = escape(f"{found['source']}:{found['line']}  split {found['split']}, group {found['group']}")
        console.print(f"[bold]{found['row_id']}[/bold]  {where}")
        console.print(f"  {found['text'][:300]}", markup=False)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("step", "verdict", "reason", "score", "keeper"):
            table.add_column(column, overflow="fold")
        for d in found["decisions"]:
            score = "" if d["score"] is None else f"{d['score']:.4g}"
            table.add_row(d["step"], "[green]kept[/green]" if d["kept"] else "[red]dropped[/red]", escape(d["reason"] or ""), score, d["keeper"] or "")
        console.print(table)
        for seen in found["seen"]:
            console.print(f"  trained on by {seen['stage']} ({seen['key'][:12]}), {seen['times']} time{'s' if seen['times'] != 1 else ''}")

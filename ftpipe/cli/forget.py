"""`ftpipe forget`: rows that no later run may use."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app


@app.command()
def forget(
    rows: Annotated[list[str], typer.Argument(metavar="ROW...", help="Row ids or their beginnings (8 digits or more).", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why; kept with the row's id in the list.")] = "",
    copies: Annotated[bool, typer.Option("--copies", help="Also the rows that were dropped as duplicates of these.")] = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Json = False,
) -> None:
    """Mark rows so that no later run uses them, wherever they stand in the data, and say which adapters saw them.

    What has been trained stays as it is: the next run makes an adapter without these rows, and old versions are yours to withdraw. The list is
    forgotten.jsonl in the workspace; it holds ids, not texts."""
    from ftpipe.cli._console import console
    from ftpipe.cli.which import show
    from ftpipe.data.forgotten import forget as mark
    from ftpipe.pipeline.lineage import contents, which

    found = contents(workspace, rows)
    near = [c for entry in found.values() for c in entry["copies"]]
    if copies and near:
        found |= contents(workspace, near)
    new = mark(workspace, found, reason)
    adapters = {a["key"]: a for entry in found.values() for a in which(workspace, entry["rows"][0])}
    if as_json:
        typer.echo(json.dumps({"forgotten": list(found), "new": new, "copies": near, "adapters": list(adapters.values())}, indent=1))
        return
    for content, entry in found.items():
        console.print(f"{content[:12]}  {'forgotten' if content in new else 'was on the list already'}: {entry['text'][:100]!r}", markup=False)
    if near and not copies:
        console.print(f"{len(near)} rows were dropped as duplicates of these, and would take their place: forget them too with --copies")
    show(list(adapters.values()))
    if adapters:
        console.print("[dim]run the pipeline again to train without them; `ftpipe registry` moves an alias off a version[/dim]")

"""`ftpipe status`: the last runs, how their stages went, and the space they take."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app


@app.command()
def status(
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's id or its beginning; without it the latest runs.", show_default=False)] = None,
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="How many runs to list.")] = 10,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Json = False,
) -> None:
    """Show the latest runs, or the stages of one run. The disk is that of what a run built itself and that is still there."""
    from rich.table import Table
    from rich.text import Text

    from ftpipe.cli._console import console
    from ftpipe.errors import ConfigError
    from ftpipe.pipeline.garbage import of_run
    from ftpipe.pipeline.runner import runs
    from ftpipe.report.numbers import size

    found = runs(workspace)
    if run_id:
        found = [r for r in found if r["id"].startswith(run_id)]
        if not found:
            raise ConfigError(f"no run {run_id!r} in {workspace}", remedy="`ftpipe status` lists them")
    disk = {r["id"]: of_run(workspace, r) for r in found[:last]}
    if as_json:
        typer.echo(json.dumps([r | {"bytes": disk[r["id"]]} for r in found[:last]], indent=1))
        return
    if not found:
        console.print(f"no runs in {workspace}")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    if run_id:
        for column in ("stage", "state", "seconds", "disk", "why", "key"):
            table.add_column(column, overflow="fold")
        for name, s in found[0]["stages"].items():
            space = disk[found[0]["id"]].get(name)
            why = _line(s.get("error", "")) or s.get("reason", "")
            table.add_row(name, s["state"], f"{s['seconds']:.1f}", size(space) if space else "", Text(why), s.get("key", "")[:12])
        console.print(table)
        return
    for column in ("run", "pipeline", "state", "built", "reused", "disk"):
        table.add_column(column, overflow="fold", no_wrap=column in ("run", "state"), justify="right" if column in ("built", "reused", "disk") else "left")
    stopped = []
    for r in found[:last]:
        states = [s["state"] for s in r["stages"].values()]
        space = sum(disk[r["id"]].values())
        table.add_row(r["id"], r["pipeline"], r["state"], str(states.count("built")), str(states.count("reused")), size(space) if space else "")
        stopped += [(r["id"], n, _line(s["error"])) for n, s in r["stages"].items() if s["state"] in ("failed", "cancelled")][:1]
    console.print(table)
    if stopped:
        console.print("\nwhat stopped them (`ftpipe log STAGE --run RUN` has all of it):", style="dim")
        for run, name, error in stopped:
            console.print(f"  {run}  {name}: {error}", markup=False, soft_wrap=True)


def _line(error: str) -> str:
    """The first line of an error: the others are what a process printed last."""
    return error.strip().partition("\n")[0]

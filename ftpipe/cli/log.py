"""`ftpipe log`: what a stage said."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Workspace, app


@app.command()
def log(
    stage: Annotated[str | None, typer.Argument(help="Stage name; may be left out with --json.", show_default=False)] = None,
    run_id: Annotated[str | None, typer.Option("--run", metavar="RUN", help="A run's id or its beginning; by default the last that ran this stage.")] = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Annotated[bool, typer.Option("--json", help="Print a run's structured log: JSON lines with run, stage, state and counts of rows.")] = False,
) -> None:
    """Print the log of a stage, also of one that failed or is at work now."""
    from ftpipe.errors import ConfigError
    from ftpipe.pipeline.events import FILE
    from ftpipe.pipeline.runner import log_files

    if as_json:
        runs = sorted((p for p in (workspace / "logs").glob(f"{run_id or ''}*/{FILE}")), key=lambda p: p.parent.name)
        if not runs:
            raise ConfigError(f"no structured log in {workspace}", remedy="`ftpipe status` lists the runs")
        for line in runs[-1].read_text(encoding="utf-8").splitlines():
            if stage is None or json.loads(line).get("stage") == stage:
                typer.echo(line)
        return
    if stage is None:
        raise ConfigError("no stage is named", remedy="ftpipe log STAGE, or --json for the whole run")

    found = [(run, path) for run, name, path in log_files(workspace) if name == stage and (run_id is None or run.startswith(run_id))]
    if not found:
        known = sorted({name for _, name, _ in log_files(workspace)})
        raise ConfigError(f"no log of stage {stage!r}", remedy=f"stages with logs: {', '.join(known) or 'none'}")
    typer.echo(found[0][1].read_text(encoding="utf-8", errors="replace"), nl=False)

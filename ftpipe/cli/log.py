"""`ftpipe log`: what a stage said."""

from __future__ import annotations

from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Workspace, app


@app.command()
def log(
    stage: Annotated[str, typer.Argument(help="Stage name.", show_default=False)],
    run_id: Annotated[str | None, typer.Option("--run", metavar="RUN", help="A run's id or its beginning; by default the last that ran this stage.")] = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Print the log of a stage, also of one that failed or is at work now."""
    from ftpipe.errors import ConfigError
    from ftpipe.pipeline.runner import log_files

    found = [(run, path) for run, name, path in log_files(workspace) if name == stage and (run_id is None or run.startswith(run_id))]
    if not found:
        known = sorted({name for _, name, _ in log_files(workspace)})
        raise ConfigError(f"no log of stage {stage!r}", remedy=f"stages with logs: {', '.join(known) or 'none'}")
    typer.echo(found[0][1].read_text(encoding="utf-8", errors="replace"), nl=False)

"""`ftpipe serve`: run a pipeline on a schedule."""

from __future__ import annotations

from typing import Annotated

import typer

from ftpipe.cli._app import Config, Set, app, overrides


@app.command()
def serve(
    config: Config,
    cron: Annotated[str | None, typer.Option(help='Cron expression, such as "0 3 * * *" for three at night.')] = None,
    every: Annotated[int | None, typer.Option(min=1, metavar="SECONDS", help="Instead of --cron: run every so many seconds.")] = None,
    timezone: Annotated[str, typer.Option(help="Time zone of the cron expression.")] = "UTC",
    name: Annotated[str | None, typer.Option(help="Name of the deployment; by default the pipeline's.")] = None,
    catch_up: Annotated[bool, typer.Option("--catch-up", help="Run at once if a run was missed while nobody served; otherwise it is left out.")] = False,
    set_: Set = None,
) -> None:
    """Stay and run the pipeline on schedule; a run over unchanged data trains nothing. Seen in the Prefect UI as a deployment."""
    import flows
    from ftpipe.pipeline import spec

    changes = overrides(set_)
    pipeline = spec.load(config, overrides=changes)
    pipeline.check()
    flows.serve(config, cron=cron, interval=every, timezone=timezone, name=name or pipeline.name, overrides=changes, catch_up=catch_up)

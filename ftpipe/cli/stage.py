"""`ftpipe stage`: one stage alone, on its recorded inputs."""

from __future__ import annotations

from typing import Annotated

import typer

from ftpipe.cli._app import Config, Set, app, overrides


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="Stage name, such as `adapter` or `curated/minhash`.", show_default=False)],
    config: Config,
    force: Annotated[bool, typer.Option(help="Run it even if nothing changed.")] = False,
    set_: Set = None,
    prefect: Annotated[bool, typer.Option(help="Run as a Prefect flow.")] = False,
) -> None:
    """Run one stage alone, on the inputs that are there already."""
    from ftpipe.cli.run import execute

    execute(config, only=name, force=(name,) if force else (), changes=overrides(set_), prefect=prefect)

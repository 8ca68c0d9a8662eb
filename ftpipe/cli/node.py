"""`ftpipe node`: this machine takes part in trainings on several machines."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Workspace, app


@app.command()
def node(
    workspace: Workspace = DEFAULT_WORKSPACE,
    name: Annotated[str, typer.Option(help="What this machine is called in messages; its host name if not given.", show_default=False)] = "",
) -> None:
    """Wait for trainings of a workspace that name several machines (`nodes` in a train stage), and run this machine's ranks.

    The workspace is the folder that the machine which runs the pipeline uses, under the same path. Ctrl-C or SIGTERM ends it, and the ranks."""
    from ftpipe.train.node import main

    main(workspace.absolute(), name or socket.gethostname())

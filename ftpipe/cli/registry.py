"""`ftpipe registry`: registered adapters and their versions."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app

group = typer.Typer(no_args_is_help=True, help="Registered adapters: list, show.")
app.add_typer(group, name="registry")
Registry = Annotated[str | None, typer.Option("--registry", envvar="FTPIPE_REGISTRY", help="MLflow registry by URL; without it the workspace's own.")]


@group.command("list")
def list_(workspace: Workspace = DEFAULT_WORKSPACE, registry: Registry = None, as_json: Json = False) -> None:
    """List every registered model with its versions and aliases."""
    from rich.table import Table

    from ftpipe import registry as store
    from ftpipe.cli._console import console

    env = environment(workspace, registry)
    listed = [version for model in store.list_models(env) for version in store.list_versions(env, model)]
    if as_json:
        typer.echo(json.dumps(listed, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("model", "version", "aliases", "registered", "content"):
        table.add_column(column, overflow="fold")
    for v in listed:
        table.add_row(v["name"], str(v["version"]), ", ".join(v["aliases"]), v["registered"], v["content"][:12])
    console.print(table if listed else f"nothing is registered in {workspace}")


@group.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Model name, NAME@ALIAS or NAME@VERSION.", show_default=False)],
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
) -> None:
    """Show one version: metrics, verdict, base model, lineage, files."""
    from ftpipe import registry as store

    model, _, which = name.partition("@")
    typer.echo(json.dumps(store.show(environment(workspace, registry), model, which or "champion"), indent=1))


def environment(workspace, registry):
    """The surroundings of a command that has no pipeline file."""
    from ftpipe.stages.base import Environment

    return Environment(workspace=workspace.absolute(), base=workspace.absolute(), pipeline="", registry_uri=registry)

"""`ftpipe registry`: registered adapters and their versions."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Json, Workspace, app

group = typer.Typer(no_args_is_help=True, help="Registered adapters and their versions.")
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


Named = Annotated[str, typer.Argument(metavar="NAME[@ALIAS|@VERSION]", help="A registered version; NAME alone means its champion.", show_default=False)]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]


def split(name: str) -> tuple[str, str]:
    model, _, which = name.partition("@")
    return model, which or "champion"


@group.command("verify")
def verify(name: Named, workspace: Workspace = DEFAULT_WORKSPACE, registry: Registry = None) -> None:
    """Hash every file of a version again. Exit status 1 if one byte is not what was registered."""
    from ftpipe.registry import versions

    found = versions.verify(environment(workspace, registry), *split(name))
    for problem in found:
        typer.echo(problem)
    if found:
        raise typer.Exit(1)
    typer.echo(f"{name}: every byte is what was registered")


@group.command("alias")
def alias(
    name: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version that the alias shall point at.", show_default=False)],
    alias: Annotated[str, typer.Argument(help="champion, challenger, or one of your own.", show_default=False)],
    reason: Reason = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
) -> None:
    """Point an alias at a version, past the gate; the history records that it was forced, by whom and why."""
    from ftpipe.errors import ConfigError
    from ftpipe.registry.register import move_alias

    if not reason:
        raise ConfigError("a move past the gate needs a reason", remedy="give one: --reason '...'")
    model, which = split(name)
    moved = move_alias(environment(workspace, registry), model, alias, which, forced=True, reason=reason)
    typer.echo(f"{model}@{alias}: version {moved['from'] or 'none'} -> {moved['to']}")


@group.command("rollback")
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME[@ALIAS]", help="Model, and the alias to move; champion by default.", show_default=False)],
    reason: Reason = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
) -> None:
    """Point an alias back at the version it pointed at before."""
    from ftpipe.registry import register

    model, which = split(name)
    moved = register.rollback(environment(workspace, registry), model, which, reason=reason)
    typer.echo(f"{model}@{which}: version {moved['from']} -> {moved['to']}")


@group.command("history")
def history(name: Annotated[str, typer.Argument(help="Model name.", show_default=False)], workspace: Workspace = DEFAULT_WORKSPACE, registry: Registry = None,
            as_json: Json = False) -> None:
    """Every move of every alias of a model, oldest first."""
    from ftpipe.registry import ledger

    for move in ledger.history(environment(workspace, registry), name):
        if as_json:
            typer.echo(json.dumps(move))
        elif move["state"] == "moved":
            forced = " forced" if move.get("forced") else ""
            typer.echo(f"{move['when'][:19]}  {move['alias']}: {move['from'] or 'none'} -> {move['to'] or 'none'}{forced}  {move.get('reason', '')}".rstrip())


@group.command("diff")
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="NAME@VERSION or NAME@ALIAS.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The version to compare it with.", show_default=False)],
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
    as_json: Json = False,
) -> None:
    """Compare two versions: settings of every stage behind them, rows they were trained on, and metrics."""
    from ftpipe.pipeline.difference import difference

    env = environment(workspace, registry)
    found = difference(env, split(a), split(b))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for change in found["settings"]:
        typer.echo(f"{change['stage']}: {change['change']}")
    rows = found["rows"]
    typer.echo(f"rows: {rows['both']} in both, {rows['only_a']} only in {a}, {rows['only_b']} only in {b}, {rows['times']} shown another number of times")
    for m in found["metrics"]:
        typer.echo(f"{m['suite']} {m['metric']}: {m['a']:.4f} -> {m['b']:.4f}")
    if not found["settings"] and not rows["only_a"] and not rows["only_b"]:
        typer.echo("the settings and the rows are the same")

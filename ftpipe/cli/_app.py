"""The Typer application that every verb's file adds itself to, and the options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ftpipe.errors import ConfigError

app = typer.Typer(name="ftpipe", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
                  help="From raw text to a registered adapter for a language model, with every row accounted for.")

Config = Annotated[Path, typer.Argument(help="Pipeline file (YAML).", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value of the file (stages.adapter.epochs=2); may be repeated.")]
Workspace = Annotated[Path, typer.Option("--workspace", "-w", envvar="FTPIPE_WORKSPACE", help="Folder that holds artifacts, caches and the registry.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

DEFAULT_WORKSPACE = Path(".ftpipe")


def overrides(items: list[str] | None) -> dict[str, Any]:
    """`["a.b=1"]` as `{"a.b": 1}`; values are YAML."""
    import yaml

    found: dict[str, Any] = {}
    for item in items or []:
        path, equals, value = item.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {item!r} has no value", remedy="write --set PATH=VALUE, such as --set stages.adapter.epochs=2")
        found[path] = yaml.safe_load(value)
    return found

"""`ftpipe export`: an adapter in a form that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Workspace, app
from ftpipe.cli.registry import Registry

Which = Annotated[str, typer.Argument(metavar="ADAPTER", help="NAME, NAME@ALIAS or NAME@VERSION of the registry, a stage, a key, or a folder.",
                                      show_default=False)]
Model = Annotated[str | None, typer.Option("--model", help="Where the base model is, if not where the training found it.")]


@app.command()
def export(
    adapter: Which,
    to: Annotated[Path, typer.Argument(help="Folder to write; must not exist.", show_default=False)],
    form: Annotated[Literal["adapter", "merged"], typer.Option(help="`adapter`: as PEFT, vLLM and the hub load it. `merged`: the whole model.")] = "adapter",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Type of merged weights.")] = "bfloat16",
    base: Annotated[Literal["trained", "original"], typer.Option(help="What an adapter of a quantised base is merged into.")] = "trained",
    model: Model = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
) -> None:
    """Write an adapter as other programs load it. The folder appears whole or not at all."""
    from ftpipe.models.export import export_adapter, export_merged
    from ftpipe.pipeline.adapters import locate

    found = locate(workspace, adapter, model=model, registry=registry)
    if form == "adapter":
        export_adapter(found.model, found.env, found.folder, to)
        typer.echo(f"wrote {to}\n  vllm serve BASE --enable-lora --lora-modules {to.name}={to}\n  peft.PeftModel.from_pretrained(base, {str(to)!r})")
    else:
        export_merged(found.model, found.env, found.folder, to, base=base, dtype=dtype)
        typer.echo(f"wrote {to}\n  transformers.AutoModelForCausalLM.from_pretrained({str(to)!r})")

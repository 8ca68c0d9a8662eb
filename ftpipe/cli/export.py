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
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Type of merged weights.")]
Base = Annotated[Literal["trained", "original"], typer.Option(help="What an adapter of a quantised base is merged into.")]


@app.command()
def export(
    adapter: Which,
    to: Annotated[Path, typer.Argument(help="Folder to write (a file for gguf); must not exist.", show_default=False)],
    form: Annotated[Literal["adapter", "merged", "gguf"], typer.Option(help="`adapter`: as PEFT, vLLM and the hub load it. `merged`: the whole model. `gguf`: "
                                                                       "the whole model in one file, by llama.cpp's converter.")] = "adapter",
    dtype: Dtype = "bfloat16",
    base: Base = "trained",
    converter: Annotated[Path | None, typer.Option(help="For gguf: llama.cpp's convert_hf_to_gguf.py, or the folder it is in; by default the environment "
                                                   "variable FTPIPE_GGUF_CONVERTER, or the PATH.")] = None,
    gguf_type: Annotated[Literal["f32", "f16", "bf16", "q8_0"], typer.Option(help="For gguf: type of the matrices.")] = "bf16",
    model: Model = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
) -> None:
    """Write an adapter as other programs load it. It appears whole or not at all."""
    from ftpipe.models.export import export_adapter, export_merged
    from ftpipe.models.gguf import export_gguf
    from ftpipe.pipeline.adapters import locate

    found = locate(workspace, adapter, model=model, registry=registry)
    if form == "adapter":
        export_adapter(found.model, found.env, found.folder, to)
        typer.echo(f"wrote {to}\n  vllm serve BASE --enable-lora --lora-modules {to.name}={to}\n  peft.PeftModel.from_pretrained(base, {str(to)!r})")
    elif form == "gguf":
        made = export_gguf(found.model, found.env, found.folder, to, converter=converter, kind=gguf_type, base=base)
        typer.echo(f"wrote {to}: {made['architecture']}, {made['tensors']} tensors, {made['compared']} of them compared with the merged model")
    else:
        export_merged(found.model, found.env, found.folder, to, base=base, dtype=dtype)
        typer.echo(f"wrote {to}\n  transformers.AutoModelForCausalLM.from_pretrained({str(to)!r})")

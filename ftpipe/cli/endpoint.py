"""`ftpipe endpoint`: an adapter behind OpenAI's protocol."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Workspace, app
from ftpipe.cli.export import Base, Dtype, Model, Which
from ftpipe.cli.registry import Registry


@app.command()
def endpoint(
    adapter: Which,
    more: Annotated[list[str] | None, typer.Argument(metavar="[-- ARGUMENTS]", help="What follows a `--` is handed to the server as it is.",
                                                     show_default=False)] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen at. Whoever can reach it can ask: the servers know no passwords unless told to.")] = "127.0.0.1",
    server: Annotated[Literal["auto", "vllm", "transformers"], typer.Option(help="Server to start; auto takes vLLM if it is installed.")] = "auto",
    dtype: Dtype = "bfloat16",
    base: Base = "trained",
    model: Model = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
) -> None:
    """Serve an adapter, merged into its base, to any client of OpenAI's protocol, until ctrl-C.

    Example: ftpipe endpoint my-adapter@champion --port 8080 -- --max-model-len 4096"""
    from ftpipe.cli._console import console
    from ftpipe.models import endpoint as served
    from ftpipe.pipeline.adapters import locate

    served.command("", host, port, server=server)  # says now what is missing
    served.free(host, port)
    found = locate(workspace, adapter, model=model, registry=registry)
    with console.status("merging the adapter into its base"):
        folder = served.prepared(found.name, found.model, found.env, found.folder, base=base, dtype=dtype)
    argv = served.command(folder.name, host, port, server=server, more=more or ())
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    typer.echo(f"{found.name} on {found.model}, once the server is up:\n"
               f"  curl {where}/chat/completions -H 'Content-Type: application/json' \\\n"
               f"""    -d '{{"model": "{folder.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'\n"""
               f"  {' '.join(argv)}    (in {folder.parent})")
    served.become(argv, folder.parent)

"""`ftpipe chat`: talk to an adapter, its base beside it."""

from __future__ import annotations

from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Workspace, app
from ftpipe.cli.export import Model, Which
from ftpipe.cli.registry import Registry


@app.command()
def chat(
    adapter: Which,
    base: Annotated[bool, typer.Option(help="Let the base model answer too, for comparison.")] = True,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    model: Model = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
) -> None:
    """Ask questions and read the answers as they are written. An empty line ends it; /new forgets what was said."""
    from ftpipe.cli._console import console
    from ftpipe.models.service import ModelService
    from ftpipe.pipeline.adapters import locate

    found = locate(workspace, adapter, model=model, registry=registry)
    with console.status("loading"):
        voices = {"base": ModelService.open(found.model, found.env)} if base else {}
        voices[found.name] = ModelService.open(found.model, found.env, adapter=found.folder)
    start = [{"role": "system", "content": system}] if system else []
    said = {name: list(start) for name in voices}
    console.print(f"[dim]{found.name} on {found.model}; /new starts again, an empty line ends[/dim]")
    while True:
        try:
            question = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not question:
            return
        if question == "/new":
            said = {name: list(start) for name in voices}
            continue
        for name, service in voices.items():
            console.print(f"[bold]{name}[/bold]")
            said[name].append({"role": "user", "content": question})
            streamer = _streamer(service)
            answer, = service.generate([service.renderer.prompt(said[name])], max_new_tokens=max_new_tokens, temperature=temperature, batch_size=1,
                                       streamer=streamer)
            console.print()
            said[name].append({"role": "assistant", "content": answer.text})


def _streamer(service):
    """Writes an answer word by word, as transformers hands its tokens over."""
    from transformers import TextStreamer

    return TextStreamer(service.tokenizer, skip_prompt=True, skip_special_tokens=True)

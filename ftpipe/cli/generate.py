"""`ftpipe generate`: answers to the prompts of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftpipe.cli._app import DEFAULT_WORKSPACE, Workspace, app
from ftpipe.cli.export import Model, Which
from ftpipe.cli.registry import Registry


@app.command()
def generate(
    adapter: Which,
    prompts: Annotated[Path, typer.Argument(help="Rows to answer: .jsonl with `prompt` or `messages` (a last answer is left out), or text, one prompt a line.",
                                            show_default=False)],
    out: Annotated[Path, typer.Argument(help="JSON lines to write: the row, and `answer`. What is in it already is not asked again.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus, with a temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    decode: Annotated[str | None, typer.Option(metavar="YAML", help="A method of decoding in place of temperature and top_p, such as "
                                               "'contrastive: {against: BASE}'; `ftpipe methods decode` lists them.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Answer by the base model too, as `base_answer`.")] = False,
    model: Model = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: Registry = None,
) -> None:
    """Answer the prompts of a file with an adapter. Stopped, it goes on where it was."""
    import yaml

    from ftpipe import slots
    from ftpipe.cli._console import console
    from ftpipe.errors import ConfigError
    from ftpipe.models.batch import answer_file
    from ftpipe.pipeline.adapters import locate

    try:
        decoder = slots.parse("decode", yaml.safe_load(decode)) if decode else None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--decode: {error}") from error
    found = locate(workspace, adapter, model=model, registry=registry)
    with console.status("") as shown:
        done = answer_file(found.model, found.env, found.folder, prompts, out, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
                           decoder=decoder, base=base, progress=lambda n, of: shown.update(f"{n} of {of} answers"))
    console.print(f"{done} answers in {out}")

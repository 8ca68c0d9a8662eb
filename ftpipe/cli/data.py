"""`ftpipe data`: questions about rows before anybody trains on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftpipe.cli._app import app

data = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
app.add_typer(data, name="data")


@data.command()
def report(
    source: Annotated[str, typer.Argument(metavar="CONFIG|DATA", help="A pipeline file (.yaml), or data as `ftpipe init` takes it.", show_default=False)],
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Stage whose rows are described; the label audit, or ingest, by default.")] = None,
    languages: Annotated[int, typer.Option(min=0, help="Rows whose language is told; 0 for none.")] = 1000,
) -> None:
    """Describe rows: lengths, sources, languages, openings, duplicates, personal data. Prints what matters and writes a page with plots."""
    from ftpipe.cli._console import ConsoleListener, console, show_logs
    from ftpipe.cli.init import source_of
    from ftpipe.pipeline import spec
    from ftpipe.pipeline.runner import Selection, run
    from ftpipe.report.sections.data import findings

    show_logs()
    if Path(source).suffix in (".yaml", ".yml"):
        plan = spec.read(source)
        base, stages = Path(source).parent, dict(plan.get("stages") or {})
        kinds = {name: (fields or {}).get("kind", name) for name, fields in stages.items()}
        stage = stage or next((n for kind in ("label_audit", "ingest") for n, k in kinds.items() if k == kind), None) or next(iter(stages), "")
    else:
        plan, base, stage = {"name": "data"}, Path(), "ingest"
        stages = {"ingest": {"source": {source_of(source): {"path": source}}, "heldout": {"share": 0}}}
    stages |= {"data_description": {"kind": "describe", "rows": stage, "languages": languages}, "data_report": {"kind": "report", "data": ["data_description"]}}
    pipeline = spec.build(plan | {"stages": stages}, base=base, source=Path(source))
    done = run(pipeline, selection=Selection.of(pipeline, to="data_report"), listener=ConsoleListener())
    for line in findings(done.artifacts["data_description"].json("description.json")):
        console.print(line)
    console.print(f"report: {done.artifacts['data_report'].file('report.html')}", soft_wrap=True)

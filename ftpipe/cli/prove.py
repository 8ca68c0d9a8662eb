"""`ftpipe prove`: does a selection of rows beat chance?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftpipe.cli._app import Config, app

Seeds = Annotated[int, typer.Option(min=1, help="Trainings of each arm; three or more let the interval speak of other seeds too.")]
Evaluation = Annotated[str | None, typer.Option(metavar="STAGE", help="Evaluate stage whose rows and suites are used; the only one by default.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File to write; beside the pipeline by default.", show_default=False)]
WriteOnly = Annotated[bool, typer.Option("--write-only", help="Write the pipeline of the experiment and do not run it.")]
Prefect = Annotated[bool, typer.Option(help="Run as a Prefect flow, seen in its UI; --no-prefect runs the same stages without it.")]


@app.command()
def prove(
    config: Config,
    selections: Annotated[list[str], typer.Argument(metavar="SELECTION...", help="Curate stages that choose rows.", show_default=False)],
    train: Annotated[str | None, typer.Option(metavar="STAGE", help="Train stage whose settings are used; the one that reads the first selection.")] = None,
    evaluation: Evaluation = None,
    pool: Annotated[str | None, typer.Option(metavar="STAGE", help="Stage the controls draw from; what the first selection starts from by default.")] = None,
    seeds: Seeds = 3,
    everything: Annotated[bool, typer.Option("--everything", help="Train on the whole pool too.")] = False,
    out: Out = None,
    write_only: WriteOnly = False,
    prefect: Prefect = True,
) -> None:
    """Train on what each SELECTION chose, on random rows and on random rows of the same lengths, of equal tokens, and compare them on the same items.

    The experiment is written as a pipeline that extends yours, and run; stopped, it goes on where it was. It ends with paired differences, their
    intervals over items and seeds, what the selection cost, and a page."""
    from ftpipe.pipeline import studies

    data = studies.prove(config, selections, train=train, evaluation=evaluation, pool=pool, seeds=seeds, everything=everything)
    finish("prove", config, data, out, " ".join(["prove", str(config), *selections]), f"proof of {', '.join(selections)}", write_only, prefect)


def finish(word: str, config: Path, data: dict, out: Path | None, command: str, what: str, write_only: bool, prefect: bool) -> None:
    """Write the experiment's pipeline and run it."""
    from ftpipe.cli.run import execute
    from ftpipe.pipeline import studies

    out = out or config.with_name(f"{config.stem}-{word}.yaml")
    last = studies.write(data, out, config, what=what, command=f"ftpipe {command}")
    typer.echo(f"wrote {out}")
    if write_only:
        typer.echo(f"  ftpipe plan {out}    what it would do\n  ftpipe run {out} --to {last}    do it")
    else:
        execute(out, to=last, prefect=prefect)

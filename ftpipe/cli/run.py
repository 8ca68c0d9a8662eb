"""`ftpipe run`: bring a pipeline up to date."""

from __future__ import annotations

from typing import Annotated

import typer

from ftpipe.cli._app import Config, Set, app, overrides


@app.command()
def run(
    config: Config,
    from_: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Start at this stage; what comes before must exist.")] = None,
    to: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    force: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="Run this stage even if nothing changed (or `all`); may be repeated.")] = None,
    set_: Set = None,
    prefect: Annotated[bool, typer.Option(help="Run as a Prefect flow, seen in its UI; --no-prefect runs the same stages without it.")] = True,
) -> None:
    """Run what is not up to date, stage by stage. Finished stages are reused; a killed run goes on where it was."""
    execute(config, start=from_, to=to, force=tuple(force or ()), changes=overrides(set_), prefect=prefect)


def execute(config, *, only=None, start=None, to=None, force=(), changes=None, prefect=True) -> None:
    """Run through Prefect or directly, and print the summary. A failed stage prints the command that resumes it."""
    from ftpipe.cli._console import ConsoleListener, show_logs
    from ftpipe.errors import FtpipeError
    from ftpipe.pipeline import spec
    from ftpipe.pipeline.runner import Run, Selection, command

    show_logs()
    pipeline = spec.load(config, overrides=changes)
    selection = Selection.of(pipeline, only=only, start=start, to=to, force=force)
    listener = ConsoleListener()
    at: str | None = None
    try:
        if prefect:
            import flows

            done = flows.run(config, only=only, start=start, to=to, force=list(force), overrides=changes or {}, listener=listener)
        else:
            from ftpipe.tracking import Listeners, MlflowListener

            done = Run(pipeline, selection=selection, listener=Listeners([listener, MlflowListener(pipeline.env)]))
            for at in done.order:
                done.execute(at)
            done.close()
    except FtpipeError as error:
        remedy = "\n  -> ".join(filter(None, [error.remedy, f"then resume with: {command(pipeline, at)}"]))
        raise type(error)(error.what, where=error.where, remedy=remedy) from error
    print_summary(done)


def print_summary(done) -> None:
    """The table that a run ends with."""
    from ftpipe.cli._console import console

    states = [s["state"] for s in done.record["stages"].values()]
    built = states.count("built")
    console.print(f"\nrun {done.id}: " + (f"{built} of {len(states)} stages ran" if built else f"nothing to do, all {len(states)} stages reused"))

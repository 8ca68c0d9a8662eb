"""`ftpipe run`: bring a pipeline up to date."""

from __future__ import annotations

import shlex
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
    from ftpipe.pipeline.runner import Selection

    show_logs()
    pipeline = spec.load(config, overrides=changes)
    selection = Selection.of(pipeline, only=only, start=start, to=to, force=force)
    listener = ConsoleListener()
    try:
        if prefect:
            import flows

            done = flows.run(config, only=only, start=start, to=to, force=list(force), overrides=changes, listener=listener)
        else:
            done = _directly(pipeline, selection, listener)
    except FtpipeError as error:
        if listener.failed_stage is None:
            raise
        resume = shlex.join(["ftpipe", "run", str(config), "--from", listener.failed_stage, *(f"--set={k}={v}" for k, v in (changes or {}).items()),
                             *(() if prefect else ("--no-prefect",))])
        remedy = "\n  -> ".join(filter(None, [error.remedy, f"then resume with: {resume}"]))
        raise type(error)(error.what, where=error.where, remedy=remedy) from error
    print_summary(done)


def _directly(pipeline, selection, listener):
    """The same stages in this process, without Prefect."""
    from ftpipe.pipeline.runner import Run
    from ftpipe.tracking import Listeners, MlflowListener

    mlflow = MlflowListener(pipeline.env, stages=pipeline.stages)
    run = Run(pipeline, selection=selection, listener=Listeners([listener, mlflow]))
    mlflow.run_id = run.id
    for name in run.order:
        run.execute(name)
    run.close()
    return run


def print_summary(run) -> None:
    """The table that a run ends with: the comparison, forgetting, the verdict, the registered version, the report, and what to try next."""
    from rich.table import Table

    from ftpipe.cli._console import console
    from ftpipe.report.summary import cells, summary

    states = [s["state"] for s in run.record["stages"].values()]
    built = states.count("built")
    console.print(f"\nrun {run.id}: " + (f"{built} of {len(states)} stages ran" if built else f"nothing to do, all {len(states)} stages reused"))
    made = {run.pipeline.stages[name].produces: artifact for name, artifact in run.artifacts.items()}
    if "study" in made:
        _study(console, made["study"])
        console.print(f"report: {made['report'].file('report.html')}" if "report" in made else "")
        return
    found = summary(made.get("evaluation"), made.get("verdict"), made.get("version"), made.get("report"))
    if found["rows"]:
        header, rows = cells(found)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for i, column in enumerate(header):
            table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table)
    if found["verdict"]:
        console.print()
        for rule in found["verdict"]["rules"]:
            mark = "[green]✓[/green]" if rule["passed"] else "[red]✗[/red]" if rule["required"] else "[yellow]·[/yellow]"
            console.print(f"  {mark} {rule['text']}")
    if found["line"]:
        console.print(f"\n[bold]{found['line']}[/bold]")
    if found["report"]:
        console.print(f"report: {found['report']}")
    if "version" in made:
        _next(console, run)


def _study(console, artifact) -> None:
    """Each arm of a study: means, differences with their intervals, tokens and time."""
    from rich.table import Table

    from ftpipe.report.numbers import count, digits_for, interval, number, seconds
    from ftpipe.report.sections.study import findings

    study, costs = artifact.json("study.json"), artifact.manifest["notes"]["costs"]
    for suite, metric in dict.fromkeys((m["suite"], m["metric"]) for m in study["means"]):
        found = {(c["a"], c["b"]): c for c in study["comparisons"] if (c["suite"], c["metric"]) == (suite, metric)}
        digits = digits_for(*((c["high"] - c["low"]) / 2 for c in found.values()))
        table = Table(box=None, pad_edge=False, header_style="dim", title=f"{suite} ({metric})", title_justify="left")
        for i, column in enumerate(["arm", "mean", "tokens", "training", *(f"better than {b} by" for b in ("base", *study["against"]))]):
            table.add_column(column, justify="right" if i else "left")
        for m in (m for m in study["means"] if (m["suite"], m["metric"]) == (suite, metric)):
            arm = m["arm"]
            told, cost = study["arms"].get(arm, {}), costs.get(arm, {})
            cells = [f"{number(c['difference'], digits, sign=True)} ({interval(c['low'], c['high'], digits, sign=True)})" if (c := found.get((arm, b))) else ""
                     for b in ("base", *study["against"])]
            table.add_row(arm, number(m["mean"], digits), count(told["tokens"][0]) if told.get("tokens") else "",
                          seconds(cost["seconds"]) if cost.get("seconds") else "", *cells)
        console.print()
        console.print(table)
    console.print()
    for line in findings(study):
        console.print(line)


def _next(console, run) -> None:
    """Commands that a newcomer may want to try next."""
    config = run.pipeline.source
    adapter = next((n for n, s in run.pipeline.stages.items() if s.produces == "version"), None)
    trained = run.pipeline.stages[adapter].adapter if adapter else ""
    console.print("\ntry next:")
    for command, what in ((f"ftpipe plan {config}", "what another run would do"), (f"ftpipe trace {trained}", "the rows that made the adapter"),
                          ("ftpipe why ROW", "what every step decided about a row"), ("ftpipe registry list", "all versions"),
                          (f'ftpipe serve {config} --cron "0 3 * * *"', "every night; unchanged data trains nothing"),
                          ("ftpipe init my_rows.jsonl", "a pipeline for your own data")):
        console.print(f"  {command:<58} [dim]{what}[/dim]", soft_wrap=True)

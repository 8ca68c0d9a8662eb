"""`ftpipe plan`: what a run would do, and why."""

from __future__ import annotations

import json

import typer

from ftpipe.cli._app import Config, Json, Set, app, overrides


@app.command()
def plan(config: Config, set_: Set = None, as_json: Json = False) -> None:
    """Say for each stage whether it would RUN or be REUSEd, and the reason. Runs nothing, needs no server."""
    from ftpipe.pipeline import spec
    from ftpipe.pipeline.plan import plan as make_plan
    from ftpipe.pipeline.store import Store

    pipeline = spec.load(config, overrides=overrides(set_))
    pipeline.check()
    planned = make_plan(pipeline, Store(pipeline.env.workspace))
    if as_json:
        listed = [{"stage": p.name, "kind": p.kind, "action": "RUN" if p.run else "REUSE", "reason": p.reason, "key": p.key} for p in planned]
        typer.echo(json.dumps(listed, indent=1))
        return
    from ftpipe.cli._console import console, plan_table

    console.print(plan_table(planned))
    todo = sum(p.run for p in planned)
    console.print(f"\n{todo} of {len(planned)} stages to run" if todo else "\nnothing to do")

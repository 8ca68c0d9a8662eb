"""`ftpipe compare`: methods of training side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ftpipe.cli._app import Config, app
from ftpipe.cli.prove import Evaluation, Out, Prefect, Seeds, WriteOnly, finish


@app.command()
def compare(
    config: Config,
    train: Annotated[str, typer.Argument(metavar="STAGE", help="Train stage to vary.", show_default=False)],
    arm: Annotated[list[str], typer.Option(metavar="NAME=YAML", help="An arm: settings that replace the stage's; repeat it. The others are compared "
                                           "with the first. Nothing after the = leaves the stage as it is.")],
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Train every arm for so many seconds of steps, in place of the stage's own end; a short "
                                                  "trial finds how many steps those are.")] = None,
    parameters: Annotated[int | None, typer.Option(min=1, help="Choose every arm's rank or width so that it trains as near as possible to so many "
                                                   "parameters.")] = None,
    evaluation: Evaluation = None,
    seeds: Seeds = 1,
    out: Out = None,
    write_only: WriteOnly = False,
    prefect: Prefect = True,
) -> None:
    """Train one stage in several ways, on the same rows in the same order, and compare them on the same items: quality, forgetting, time, memory, size.

    The budget is the stage's own end (as many steps), or --seconds, and --parameters beside either. The page says what each arm really got.

    Example: ftpipe compare pipeline.yaml adapter --arm lora= --arm "dft={objective: dft}" --arm "pissa={adapt: {pissa: {r: 16}}}" --seeds 3"""
    from ftpipe.pipeline import studies

    data = studies.compare(config, train, dict(map(parsed, arm)), evaluation=evaluation, seeds=seeds, seconds=seconds, parameters=parameters)
    for name, chosen in data["stages"]["compare_study"].get("budget", {}).get("sizes", {}).items():
        typer.echo(f"{name}: {chosen}")
    words = " ".join(["compare", str(config), train, *(f"--arm '{a}'" for a in arm), *([f"--seconds {seconds:g}"] if seconds else []),
                      *([f"--parameters {parameters}"] if parameters else [])])
    finish("compare", config, data, out, words, f"comparison of ways to train {train}", write_only, prefect)


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """`name=YAML` as a name and settings. Raises ConfigError if it is not one."""
    import yaml

    from ftpipe.errors import ConfigError

    name, equals, value = text.partition("=")
    try:
        settings = yaml.safe_load(value) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"--arm {name}: not valid YAML: {error}") from error
    if not equals or not name or not isinstance(settings, dict):
        raise ConfigError(f"--arm {text!r} is no arm", remedy='write --arm NAME=YAML, such as --arm "dft={objective: dft}"')
    return name, settings

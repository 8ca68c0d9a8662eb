"""Prefect flows: a loop over a run's stages.

`run` and `serve` are what the command line calls. Prefect is imported inside them; its settings must be in the environment before that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftpipe.pipeline.runner import Run
    from ftpipe.stages.base import Listener

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_CLIENT_RETRY_JITTER_FACTOR": "0.2",
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""Prefect sends no usage data anywhere, and is patient with a slow disk and with a server that is restarted (its own patience of a minute becomes eight),
unless the user's environment says otherwise."""

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)


def run(config_path: str | Path, *, only: str | None = None, start: str | None = None, to: str | None = None, force: Iterable[str] = (),
        overrides: dict[str, Any] | None = None, listener: Listener | None = None) -> Run:
    """Run a pipeline as a Prefect flow in this process and return the finished `Run`.

    Args:
        config_path: the pipeline file. only, start, to, force: which stages, as in `Selection.of`.
        overrides: values by dotted path. listener: hears progress beside Prefect and MLflow.

    Raises:
        FtpipeError: what a stage raised, unchanged. InfrastructureError: the Prefect API could not be reached or started.
        KeyboardInterrupt: after a ctrl-C, when every child process has ended and the flow run is marked cancelled.
    """
    from flows.running import run_flow

    return run_flow(config_path, only=only, start=start, to=to, force=force, overrides=overrides, listener=listener)


def serve(config_path: str | Path, *, cron: str | None = None, interval: float | None = None, timezone: str | None = None, name: str | None = None,
          overrides: dict[str, Any] | None = None, limit: int = 1, catch_up: bool = False) -> None:
    """Register a deployment of the pipeline and run it on schedule until interrupted.

    Args:
        cron: a cron expression of five fields. interval: seconds between starts. With neither, runs are started from the UI.
        timezone: of the cron expression, such as Europe/Berlin; UTC by default.
        name: the deployment's name; the pipeline's by default. limit: how many runs may be under way at once; further ones wait.
        catch_up: run at once if the schedule had one or more runs while nobody served; otherwise these are left out.

    Raises:
        ConfigError: for a configuration, schedule or time zone that cannot work. InfrastructureError: the Prefect API cannot be reached.
    """
    from flows.serving import serve_flow

    serve_flow(config_path, cron=cron, interval=interval, timezone=timezone, name=name, overrides=overrides, limit=limit, catch_up=catch_up)

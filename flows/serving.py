"""`ftpipe serve`: a deployment with a schedule, and the runner that executes it on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import notify
from flows.server import api, ui
from ftpipe.errors import ConfigError
from ftpipe.pipeline import spec


def serve_flow(config_path: str | Path, *, cron: str | None, interval: float | None, timezone: str | None, name: str | None,
               overrides: dict[str, Any] | None, limit: int, catch_up: bool) -> None:
    """See `flows.serve`. Stopping it pauses the schedule, so that no late runs pile up; serving again takes it up again."""
    if limit < 1:
        raise ConfigError(f"limit is {limit}", where="serve", remedy="at least one run must be allowed")
    config = Path(config_path).absolute()
    pipeline = spec.load(config, overrides=overrides)
    pipeline.check()
    wanted = schedule(cron=cron, interval=interval, timezone=timezone)
    # A relative workspace counts from where ftpipe is started, which is not where a run started from the UI may find itself.
    parameters = {"config": str(config), "overrides": {**(overrides or {}), "workspace": str(pipeline.env.workspace)}}
    with api(schedules=True) as url:
        from prefect import get_client
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
        from prefect.flows import EntrypointType

        from flows.data_to_model import data_to_model
        from flows.stale import end_unbegun, mark_crashed

        mark_crashed()
        with get_client(sync_client=True) as client:
            notify.automate(client, pipeline.name, pipeline.settings.notify)
        runner = _runner(name or pipeline.name, limit)
        id = runner.add_flow(
            data_to_model, name=name or pipeline.name, parameters=parameters, schedules=[wanted] if wanted else [], tags=[notify.tag(pipeline.name)],
            description=f"Keeps the adapter of `{config}` up to date. A run over unchanged data reuses every stage.",
            concurrency_limit=ConcurrencyLimitConfig(limit=limit, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        with get_client(sync_client=True) as client:
            late = catch_up and wanted is not None and _was_due(client, id, wanted)
            end_unbegun(client, id)
            _forget_missed_runs(client, id)
            client.resume_deployment(id)  # stopping the last `ftpipe serve` paused it
            if late:
                client.create_flow_run_from_deployment(id)
        if late:
            print("a run was missed while nobody served; it is made up for now", flush=True)
        print(f"{pipeline.name} is served {_words(wanted)}; ctrl-C pauses it\n{ui(url)}/deployments/deployment/{id}", flush=True)
        # A script that starts us with `&` leaves SIGINT ignored, and SIGTERM ends the runner by way of it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            asyncio.run(runner.start())
        except KeyboardInterrupt:
            _let_go(id)
            print("stopped; the schedule is paused until it is served again", flush=True)


def _let_go(deployment: Any) -> None:
    """End the runs that the runner left unended as it ended itself. Where the server is gone too, the next `ftpipe serve` does it."""
    import httpx
    from prefect import get_client

    from flows.stale import end_unbegun, mark_crashed

    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        end_unbegun(client, deployment)
        mark_crashed()


def _runner(name: str, limit: int) -> Any:
    from prefect.runner import Runner

    class InterruptibleRunner(Runner):
        """SIGTERM ends it as ctrl-C in a terminal does, which reaches the flows' processes too.

        Prefect's own handler waits inside the event loop for that same loop; and a runner that is interrupted waits for its flows to end
        before it asks them to.
        """

        def handle_sigterm(self, *args: Any, **kwargs: Any) -> None:
            for flow_process in multiprocessing.active_children():
                flow_process.terminate()
            signal.raise_signal(signal.SIGINT)

    return InterruptibleRunner(name=name, limit=limit, pause_on_shutdown=True)


def _was_due(client: Any, deployment: Any, wanted: Any) -> bool:
    """Whether the schedule had a run since the last one began; False if there was none yet."""
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    last = client.read_flow_runs(deployment_filter=DeploymentFilter(id={"any_": [deployment]}), flow_run_filter=FlowRunFilter(start_time={"is_null_": False}),
                                 sort=FlowRunSort.START_TIME_DESC, limit=1)
    return bool(last) and due_after(wanted, last[0].start_time) <= datetime.now(UTC)


def due_after(wanted: Any, moment: datetime) -> datetime:
    """The first time after `moment` at which a schedule (see `schedule`) has a run."""
    if wanted.interval:
        return moment + wanted.interval
    from prefect.server.schemas.schedules import CronSchedule

    return asyncio.run(CronSchedule(cron=wanted.cron, timezone=wanted.timezone).get_dates(1, start=moment))[0]


def _forget_missed_runs(client: Any, deployment: Any) -> None:
    """Remove runs that an earlier schedule left: those missed while nobody served, and those of another cron expression. The server plans anew."""
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.client.schemas.objects import StateType

    while left := [r for r in client.read_flow_runs(deployment_filter=DeploymentFilter(id={"any_": [deployment]}), limit=200,
                                                    flow_run_filter=FlowRunFilter(state={"type": {"any_": [StateType.SCHEDULED]}})) if r.auto_scheduled]:
        for run in left:
            client.delete_flow_run(run.id)


def _words(wanted: Any) -> str:
    if wanted is None:
        return "without a schedule"
    return f"on `{wanted.cron}` ({wanted.timezone})" if wanted.cron else f"every {wanted.interval.total_seconds():g} s"


def schedule(*, cron: str | None, interval: float | None, timezone: str | None) -> Any:
    """A Prefect schedule, or None if neither is given. Raises ConfigError for one that cannot work."""
    if cron is not None and interval is not None:
        raise ConfigError("both a cron expression and an interval are given", where="serve", remedy="give one of them")
    if interval is not None:
        if interval < 1:
            raise ConfigError(f"the interval is {interval} s", where="serve", remedy="write it in seconds, at least 1")
        from prefect.schedules import Interval

        return Interval(interval)
    if cron is None:
        return None
    from pydantic import ValidationError

    zone = _zone(timezone or "UTC")
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.schedules import Cron

    try:
        CronSchedule(cron=cron, timezone=zone)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{cron!r} is no cron expression: {reason}", where="serve",
                          remedy='five fields: minute hour day-of-month month day-of-week, such as "0 3 * * *" for three at night') from error
    return Cron(cron, timezone=zone)


def _zone(name: str) -> str:
    from zoneinfo import ZoneInfo, available_timezones

    from ftpipe.errors import nearest

    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        near = nearest(name, available_timezones()).partition("? ")[0]
        raise ConfigError(f"there is no time zone {name!r}", where="serve",
                          remedy=f"{near}?" if near.startswith("did") else "use a name such as Europe/Berlin or UTC") from error
    return name

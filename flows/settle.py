"""How tasks ended, where Prefect's server was away when it was told.

Prefect 3 sends a task's states as events, in the background, and gives one up after ten seconds without a server; the flow's own states are asked and
answered, so a flow waits for its server. One that is restarted at the wrong moment would show a task as running for ever in a flow that has ended.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from flows.server import flush

PATIENCE = 5.0
"""Seconds for the server to record the events that did arrive."""
MESSAGE = "Prefect's server was away when this task ended; it is recorded as its flow run is."


class Lost(logging.Filter):
    """Counts the events that Prefect gives up, and keeps off the console the page of text that it prints about each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        gone = "failed to process item" in str(record.msg) and isinstance(record.args, tuple) and "EventsWorker" in map(str, record.args)
        self.count += gone
        return not gone


lost = Lost()
logging.getLogger("prefect._internal.concurrency").addFilter(lost)


def settle(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook of the flows, called when the server has taken their end: where events were lost, end the tasks that the server still takes for running."""
    if not lost.count:
        return
    from prefect import get_client
    from prefect.client.schemas.filters import TaskRunFilter
    from prefect.client.schemas.objects import StateType
    from prefect.states import State

    flush(PATIENCE)
    unfinished = TaskRunFilter(flow_run_id={"any_": [flow_run.id]}, state={"type": {"any_": [StateType.PENDING, StateType.RUNNING, StateType.SCHEDULED]}})
    with get_client(sync_client=True) as client:
        end = time.monotonic() + PATIENCE
        while (left := client.read_task_runs(task_run_filter=unfinished)) and time.monotonic() < end:
            time.sleep(0.5)
        for task_run in left:
            client.set_task_run_state(task_run.id, State(type=state.type, name=state.name, message=MESSAGE), force=True)
    lost.count = 0

"""Flow runs whose process was killed before it could say so."""

from __future__ import annotations

import os
import socket
from typing import Any

from flows.server import SESSION
from ftpipe.processes import born, lives

FLOWS = ["data-to-model", "one-stage"]


def labels() -> dict[str, Any]:
    """Who runs this flow, as labels of the flow run: host, process and when that process began (process numbers are used again)."""
    pid = os.getpid()
    return {"ftpipe.host": socket.gethostname(), "ftpipe.pid": pid, "ftpipe.born": born(pid) or "", "ftpipe.session": os.environ.get(SESSION, "")}


def alive(found: dict[str, Any]) -> bool:
    """Whether the process that the labels name is still there (a zombie is not)."""
    return lives(int(found["ftpipe.pid"]), str(found["ftpipe.born"]))


def mark_crashed(*, session: str | None = None) -> int:
    """Mark this host's running flow runs as crashed if their process is gone, and their tasks too.

    Args:
        session: look only at the flow runs of one `ftpipe run` or `ftpipe serve`.

    Returns:
        How many running flow runs have a process that is still there.
    """
    from prefect import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled, Crashed

    unfinished = {"type": {"any_": [StateType.RUNNING, StateType.CANCELLING]}}
    left = 0
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_filter=FlowFilter(name={"any_": FLOWS}), flow_run_filter=FlowRunFilter(state=unfinished), limit=200):
            found = flow_run.labels
            if found.get("ftpipe.host") != socket.gethostname() or (session is not None and found.get("ftpipe.session") != session):
                continue
            if alive(found):
                left += 1
                continue
            cancelled = flow_run.state is not None and flow_run.state.is_cancelling()
            message = "The process of this flow run was killed."
            client.set_flow_run_state(flow_run.id, Cancelled(message=message) if cancelled else Crashed(message=message), force=True)
            for task_run in client.read_task_runs(task_run_filter=TaskRunFilter(flow_run_id={"any_": [flow_run.id]}, state=unfinished)):
                client.set_task_run_state(task_run.id, Crashed(message=message), force=True)
    return left


def end_unbegun(client: Any, deployment: Any) -> int:
    """Mark runs of a deployment as crashed that a runner had taken on and not begun when it ended; returns how many.

    They would hold the deployment's only place for ever, and every later run would wait for it.
    """
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    pending = FlowRunFilter(state={"type": {"any_": [StateType.PENDING]}})
    left = client.read_flow_runs(deployment_filter=DeploymentFilter(id={"any_": [deployment]}), flow_run_filter=pending, limit=200)
    for flow_run in left:
        client.set_flow_run_state(flow_run.id, Crashed(message="`ftpipe serve` ended before this run began."), force=True)
    return len(left)

"""The task that runs one stage."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from ftpipe.errors import FtpipeError, may_pass
from ftpipe.pipeline.runner import Run
from tasks.publish import publish


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Whether the error that failed the task may go away by itself; see `may_pass`. What the stage left in its work folder is taken up again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and may_pass(error)


@task(name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False, retries=3, retry_delay_seconds=exponential_backoff(5),
      retry_jitter_factor=0.3, retry_condition_fn=worth_retrying)
def execute(name: str, run: Run, handler: Any = None) -> Any:
    """Bring the stage `name` of `run` up to date. Call it directly: a submitted task is not interrupted when its flow is cancelled.

    Args:
        handler: the flow's log handler (`flows.logs.PrefectLog`), which is to write to this task's log meanwhile.

    Returns:
        The key of the stage's artifact; the state is called Reused if there was nothing to do.
    """
    with handler.stage(get_run_logger()) if handler else nullcontext():
        try:
            artifact = run.execute(name)
        except FtpipeError as error:
            logging.getLogger("ftpipe").error("%s: %s", name, error)
            raise
    entry = run.record["stages"][name]
    if entry["state"] == "reused":
        return Completed(name="Reused", message=f"{entry['reason']}: {artifact.key[:12]}", data=artifact.key)
    publish(run.pipeline.name, artifact)
    return artifact.key

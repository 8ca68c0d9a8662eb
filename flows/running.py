"""`ftpipe run`: the flow in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.notify import tag
from flows.server import api, flush, ui
from flows.session import Session, current
from ftpipe.pipeline import spec

if TYPE_CHECKING:
    from ftpipe.pipeline.runner import Run
    from ftpipe.stages.base import Listener


def run_flow(config_path: str | Path, *, only: str | None, start: str | None, to: str | None, force: Iterable[str], overrides: dict[str, Any] | None,
             listener: Listener | None) -> Run:
    """See `flows.run`."""
    # The caller shows progress and errors; Prefect's own console lines would say everything twice.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    name = spec.load(config_path, overrides=overrides).name  # what is wrong with the file is said before a server is asked for
    session = Session(listener)
    with api(schedules=False) as url:
        print(f"Prefect shows this run at {ui(url)}", file=sys.stderr, flush=True)
        from prefect import tags
        from prefect.exceptions import CancelledRun

        from flows.data_to_model import data_to_model
        from flows.stale import mark_crashed

        mark_crashed()
        token = current.set(session)
        try:
            with tags(tag(name)):  # from the start: the server's events keep the tags that a run is created with
                data_to_model(str(Path(config_path).absolute()), only=only, start=start, to=to, force=list(force), overrides=overrides)
        except CancelledRun:
            raise KeyboardInterrupt from None
        finally:
            current.reset(token)
            flush()
    return session.run

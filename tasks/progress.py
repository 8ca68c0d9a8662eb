"""A progress bar in the UI for the stage at work."""

from __future__ import annotations

import contextvars
import threading
from dataclasses import dataclass, field
from typing import Any

from prefect.context import TaskRunContext
from prefect.logging import get_logger

from ftpipe.stages.base import Listener
from tasks.publish import impatient, slug


@dataclass
class _Bar:
    """One stage's bar. Changed by the stage under `lock`, which is never held while a server is waited for; sent under `sending`."""

    key: str
    task_run_id: Any
    flow_run_id: Any
    percent: float = 0.0
    text: str = ""
    changed: bool = False
    id: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    sending: threading.Lock = field(default_factory=threading.Lock)


class ProgressArtifacts(Listener):
    """Sends the latest progress of the running stage to Prefect every `every` seconds, from a thread of its own.

    Training must not wait for the server, so `progress` only notes the numbers; when the server fails, the bar stands still for a minute.
    """

    def __init__(self, pipeline: str, *, every: float = 2.0, pause: float = 60.0):
        self.pipeline, self.every, self.pause = pipeline, every, pause
        self._bar: _Bar | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def started(self, name: str, kind: str, key: str) -> None:
        context = TaskRunContext.get()
        run = context.task_run if context else None
        self._bar = _Bar(slug(f"{self.pipeline}-{name}-progress"), run.id if run else None, run.flow_run_id if run else None)

    def progress(self, name: str, done: float, total: float | None, unit: str, metrics: dict[str, float]) -> None:
        bar = self._bar
        if bar is None or not total:
            return
        with bar.lock:
            bar.percent = max(0.0, min(100.0, 100.0 * done / total))
            bar.text = " · ".join([f"{name}: {done:g} of {total:g} {unit}".strip(), *(f"{k} {v:.4g}" for k, v in metrics.items())])
            bar.changed = True
        if self._thread is None:
            # The context carries Prefect's settings.
            self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._send_all,), name="ftpipe-progress", daemon=True)
            self._thread.start()

    def finished(self, name: str, artifact: Any, reused: bool) -> None:
        bar, self._bar = self._bar, None
        if bar is not None and bar.text:
            with bar.lock:
                bar.percent, bar.changed = 100.0, True
            self._send(bar)

    def failed(self, name: str, error: BaseException) -> None:
        bar, self._bar = self._bar, None
        if bar is not None and isinstance(error, Exception):  # a run that is being stopped has no time for this
            self._send(bar)

    def close(self) -> None:
        """Stop sending."""
        self._over.set()

    def _send_all(self) -> None:
        while not self._over.wait(self.every):
            bar = self._bar
            if bar is not None and not self._send(bar):
                self._over.wait(self.pause)

    def _send(self, bar: _Bar) -> bool:
        from prefect import get_client
        from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

        with bar.sending:
            with bar.lock:
                if not bar.changed:
                    return True
                percent, text, bar.changed = bar.percent, bar.text, False
            try:
                with impatient(1), get_client(sync_client=True) as client:
                    if bar.id is None:
                        bar.id = client.create_artifact(ArtifactCreate(key=bar.key, type="progress", data=percent, description=text,
                                                                       task_run_id=bar.task_run_id, flow_run_id=bar.flow_run_id)).id
                    else:
                        client.update_artifact(bar.id, ArtifactUpdate(data=percent, description=text))
            except Exception as error:
                bar.changed = True
                get_logger("progress").debug("progress could not be sent: %s", error)
                return False
            return True

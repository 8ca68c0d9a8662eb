"""A run's structured log: one JSON object a line, for programs that collect logs."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftpipe.secrets import hidden

FILE = "events.jsonl"


class Events:
    """Appends to `<workspace>/logs/<run>/events.jsonl`. A disk that takes no more lines does not stop a run.

    Every line has `time` (UTC), `run`, `pipeline` and `event`, which is `run` (started or ended: `state`), `stage` (started, built, reused or failed: `state`,
    with `seconds`, `reason`, `key` and the `counts` of rows) or `log` (what a stage said: `level`, `message`). The last two name the `stage`.
    """

    def __init__(self, workspace: Path, run: str, pipeline: str):
        self.path = workspace / "logs" / run / FILE
        self.always = {"run": run, "pipeline": pipeline}

    def __call__(self, event: str, **fields: Any) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **self.always, "event": event, **fields}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(hidden(line), ensure_ascii=False) + "\n")

    def handler(self, stage: str) -> logging.Handler:
        """A handler that writes what a stage logs."""
        return _Handler(self, stage)


class _Handler(logging.Handler):
    def __init__(self, events: Events, stage: str):
        super().__init__(logging.INFO)
        self.events, self.stage = events, stage

    def emit(self, record: logging.LogRecord) -> None:
        error = {"error": logging.Formatter().formatException(record.exc_info)} if record.exc_info else {}
        self.events("log", stage=self.stage, level=record.levelname, message=record.getMessage(), **error)

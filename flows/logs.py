"""The stages' log lines in Prefect's log, at a bounded rate: every line is an insert into the server's database."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ftpipe.artifacts import LOG
from ftpipe.secrets import hide


class PrefectLog(logging.Handler):
    """Sends records to a Prefect run logger: the flow's, or that of the stage at work.

    Args:
        target: the flow run's logger.
        rate: lines a second in the long run. burst: lines that may come at once. Warnings and errors have an allowance of their own.
    """

    def __init__(self, target: Any, *, rate: float = 5.0, burst: int = 200):
        super().__init__(logging.INFO)
        self.target, self.rate, self.burst = target, rate, burst
        self._allowance = {False: float(burst), True: float(burst)}
        self._refilled = time.monotonic()
        self._left_out = 0
        self._guard = threading.RLock()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with self._guard:
                self._refill()
                serious = record.levelno >= logging.WARNING
                if self._allowance[serious] < 1:
                    self._left_out += 1
                    return
                self._allowance[serious] -= 1
                self._mention_what_was_left_out()
            text = record.getMessage()
            if record.exc_info:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            self.target.log(record.levelno, "%s", hide(text))
        except Exception:
            self.handleError(record)

    @contextmanager
    def stage(self, target: Any) -> Iterator[None]:
        """Send to a stage's logger for the length of the block, with a full allowance."""
        before, self.target = self.target, target
        with self._guard:
            self._allowance = {False: float(self.burst), True: float(self.burst)}
        try:
            yield
        finally:
            self.finish()
            self.target = before

    def finish(self) -> None:
        """Say how many lines were left out since the last one shown."""
        with self._guard:
            self._mention_what_was_left_out()

    def _refill(self) -> None:
        now = time.monotonic()
        for serious, value in self._allowance.items():
            self._allowance[serious] = min(self.burst, value + (now - self._refilled) * self.rate)
        self._refilled = now

    def _mention_what_was_left_out(self) -> None:
        if self._left_out:
            self.target.info("%d lines are left out here; %s of the stage has them all", self._left_out, LOG)
            self._left_out = 0


@contextmanager
def to_prefect(target: Any, **limits: Any) -> Iterator[PrefectLog]:
    """Send everything logged under `ftpipe` to Prefect for the length of the block, and to nowhere else but ftpipe's own handlers."""
    logger, handler = logging.getLogger("ftpipe"), PrefectLog(target, **limits)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    logger.propagate = False  # Prefect prints what it logs; the root logger would print it a second time
    try:
        yield handler
    finally:
        handler.finish()
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

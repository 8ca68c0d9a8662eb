"""What a caller in the same process shares with the flow beside its parameters, which must be JSON."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftpipe.pipeline.runner import Run
    from ftpipe.stages.base import Listener


@dataclass
class Session:
    """listener: hears the run. run: the run, once there is one."""

    listener: Listener | None = None
    run: Run | None = None


current: ContextVar[Session | None] = ContextVar("ftpipe_session", default=None)

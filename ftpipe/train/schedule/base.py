"""The base of schedules: the factor of the learning rate at a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from ftpipe.slots import Method


class Schedule(Method):
    """A function of the step alone, so that a resume needs no state."""

    slot: ClassVar[str] = "train/schedule"

    @abstractmethod
    def factor(self, steps: int, warmup: int) -> Callable[[int], float]:
        """The factor at step s (from 0) of `steps`, of which the first `warmup` warm up."""

"""Linear: up during warmup, then straight down to zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from ftpipe.train.schedule._transformers import factor_of
from ftpipe.train.schedule.base import Schedule


class Linear(Schedule):
    """Reaches zero one step after the last."""

    libraries: ClassVar[tuple[str, ...]] = ("transformers",)

    def factor(self, steps: int, warmup: int) -> Callable[[int], float]:
        return factor_of("get_linear_schedule_with_warmup", warmup, steps)

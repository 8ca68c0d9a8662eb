"""Cosine: up during warmup, then down to zero along half a cosine."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from ftpipe.train.schedule._transformers import factor_of
from ftpipe.train.schedule.base import Schedule


class Cosine(Schedule):
    """Slow at first, fast in the middle, slow at the end."""

    libraries: ClassVar[tuple[str, ...]] = ("transformers",)

    def factor(self, steps: int, warmup: int) -> Callable[[int], float]:
        return factor_of("get_cosine_schedule_with_warmup", warmup, steps)

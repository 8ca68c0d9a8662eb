"""Constant: up during warmup, then level."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from ftpipe.train.schedule._transformers import factor_of
from ftpipe.train.schedule.base import Schedule


class Constant(Schedule):
    """The factor stays 1 after the warmup."""

    libraries: ClassVar[tuple[str, ...]] = ("transformers",)

    def factor(self, steps: int, warmup: int) -> Callable[[int], float]:
        return factor_of("get_constant_schedule_with_warmup", warmup)

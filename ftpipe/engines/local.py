"""This machine, and nothing else."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ftpipe.engines.base import Engine


class Local(Engine):
    """Work is done in this process, on all of its processors where it lets the interpreter's lock go."""

    def map(self, work: Callable[..., Any], items: Iterable[Any], *, common: Sequence[Any] = (), alone: bool = False, threads: int = 1,
            gpu: bool = False) -> Iterator[Any]:
        if alone:
            return (work(item, *common) for item in items)
        return parallel(partial(_with, work, tuple(common)) if common else work, items)


def _with(work: Callable[..., Any], common: tuple[Any, ...], item: Any) -> Any:
    return work(item, *common)


def parallel(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map(work, items)` on all processors, with a bounded number of results waiting. numpy and Arrow release the interpreter's lock."""
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

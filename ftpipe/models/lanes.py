"""Forward (and backward) passes side by side on a CPU, each by a part of the process's threads.

Threads that share every small operation of a model wait for each other at the end of each; those that compute a batch each do not, and while one waits
for memory the other multiplies.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import product
from typing import Any, TypeVar

LANES = 2
FEW = 8
"""Items of which every division is looked at."""
Item, Result = TypeVar("Item"), TypeVar("Result")


class Lanes:
    """`LANES` threads that compute with `threads` of torch's together."""

    def __init__(self, threads: int):
        import torch

        self._pool = ThreadPoolExecutor(LANES, "lane")
        together = threading.Barrier(LANES)

        def begin(_: int) -> None:
            torch.get_num_threads()  # a thread that asks for it first later on, as every operation does, would be given the process's number
            torch.set_num_threads(max(1, threads // LANES))
            together.wait()  # so that each thread has begun

        list(self._pool.map(begin, range(LANES)))
        torch.set_num_threads(threads)  # the number is the process's too, as far as torch asks for it

    def results(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """function(item) of each, in order. After an error, or when no more is asked for, nothing is begun any more and what is running is waited for."""
        tasks: deque[Future[Any]] = deque()
        try:
            for item in items:
                tasks.append(self._pool.submit(function, item))
                if len(tasks) > 2 * LANES:
                    yield tasks.popleft().result()
            while tasks:
                yield tasks.popleft().result()
        finally:
            for task in tasks:
                task.cancel()
            wait(tasks)


def in_order(sizes: Sequence[int]) -> list[int]:
    """In which order to begin items of these sizes so that the lanes end together, as nearly as can be: of few items the best of all divisions,
    of many the next largest to the lane with the least."""
    longest = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    divisions = product(range(LANES), repeat=len(sizes) - 1) if 1 < len(sizes) <= FEW else ()

    def loads(division: Sequence[int]) -> list[int]:
        return [sum(sizes[i] for i, at in zip(longest, division, strict=True) if at == lane) for lane in range(LANES)]

    greedy: list[int] = []
    for _ in longest:
        so_far = [sum(sizes[i] for i, at in zip(longest, greedy) if at == lane) for lane in range(LANES)]
        greedy.append(so_far.index(min(so_far)))
    best = min([greedy, *((0, *d) for d in divisions)], key=lambda d: max(loads(d), default=0))
    begin, starts = [0] * LANES, {}
    for i, lane in zip(longest, best, strict=True):
        starts[i] = begin[lane]
        begin[lane] += sizes[i]
    return sorted(longest, key=lambda i: starts[i])


def possible(model: Any, threads: int) -> bool:
    """Whether several passes of a model may run at the same time: on a CPU with threads enough, where all its decoder layers are computed by
    `kernels.layer`, which neither draws random numbers nor changes the model, and nobody listens."""
    from ftpipe.models.kernels import layer

    return threads >= LANES and next(model.parameters()).device.type == "cpu" and layer.serves(model)

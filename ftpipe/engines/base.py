"""The base of engines: where work that falls into pieces is done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from ftpipe.slots import Method


class Engine(Method):
    """Does a step's work piece by piece. It decides how fast and where, never what comes out, so it is no part of any stage's key."""

    slot: ClassVar[str] = "engines"
    spreads: ClassVar[bool] = False
    """Pieces are done in other processes, perhaps on other machines: what they need travels with them, and no path of this machine means anything there."""

    def check(self) -> None:
        """Raise ConfigError or InfrastructureError if it cannot be used, before a step that might use it runs."""

    def threads(self, wanted: int) -> int:
        """How many threads a piece of work may have that would take `wanted` of them."""
        return wanted

    @abstractmethod
    def map(self, work: Callable[..., Any], items: Iterable[Any], *, common: Sequence[Any] = (), alone: bool = False, threads: int = 1,
            gpu: bool = False) -> Iterator[Any]:
        """`work(item, *common)` for each item, in the order of the items; a bounded number of items and results waits at a time.

        Args:
            work: a function of a module, or a `functools.partial` of one. Its result must depend on its arguments alone: where a machine is lost, it is called
                again. Arrays in items and `common` may be read only.
            common: what every item needs; it is sent once.
            alone: on one machine it does one item after the other, because it holds the interpreter's lock or its items fill the memory.
            threads: processors that one item keeps busy. gpu: it needs a GPU.
        """

"""The base of methods that make one adapter out of several."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta, Deltas


class Merger(Method):
    """Combines changes of weights. A method writes `merge`; reading, checking and writing adapters is done by the stage."""

    slot: ClassVar[str] = "merge"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.merge._deltas",)

    @abstractmethod
    def merge(self, adapters: Mapping[str, Deltas]) -> tuple[dict[str, Delta], dict[str, Any]]:
        """The merged change, and what is to be said about it (JSON: weights, ranks, errors), from the adapters' changes by name, in the order given.

        A weight that an adapter leaves alone is not among its changes. Raises ConfigError for settings that do not fit the adapters.
        """

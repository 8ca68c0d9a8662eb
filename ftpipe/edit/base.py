"""The base of methods that turn an adapter's change into another one."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta, Deltas


class Editor(Method):
    """Edits a change of weights. A method writes `edit`; reading, checking and writing adapters is done by the stage."""

    slot: ClassVar[str] = "edit"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.merge._deltas",)

    @abstractmethod
    def edit(self, deltas: Deltas) -> tuple[dict[str, Delta], dict[str, Any]]:
        """The edited change by parameter name, and what is to be said about it (JSON)."""

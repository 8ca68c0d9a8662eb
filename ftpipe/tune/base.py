"""The base of methods that say which settings to try next."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ftpipe.slots import Method


@dataclass(frozen=True)
class Trial:
    """One trial: the settings that were tried (values by dotted path into the pipeline, as `load(overrides=...)` takes them) and their score, more being
    better; None for a trial that failed."""

    settings: dict[str, Any]
    score: float | None


class Tuner(Method):
    """Proposes settings. The caller runs each proposal as a pipeline with those settings, and asks again with what came of them."""

    slot: ClassVar[str] = "tune"

    @abstractmethod
    def propose(self, done: Sequence[Trial]) -> list[dict[str, Any]]:
        """Settings to try next, given all trials so far, in an order that is always the same; none when the search is over."""

    def best(self, done: Sequence[Trial]) -> Trial | None:
        """The trial with the highest score, the earliest of equals; None if none succeeded."""
        return max((t for t in done if t.score is not None), key=lambda t: t.score, default=None)  # type: ignore[arg-type,return-value]

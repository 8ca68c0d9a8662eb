"""The base of suites: a list of items, and a score for each item under one system."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.slots import Method
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from ftpipe.data.rows import RowSet
    from ftpipe.evaluate.systems import System


@dataclass(frozen=True)
class Given:
    """What a suite's items may be made from: the rows stage of the evaluation (its held-out split), and the surroundings."""

    rows: RowSet
    env: Environment
    log: logging.Logger


@dataclass(frozen=True)
class Item:
    """One thing that every system is asked.

    id: unique within its suite. content: hash of all that decides a system's score on it, beside the suite's settings; results are kept by it.
    slice: group it belongs to, for tables by group and for resampling whole groups. suite: the name it is reported under. ask: whatever
    `measure` needs. source: where its row was read from, if it is one.
    """

    id: str
    content: str
    slice: str
    suite: str
    ask: Any
    source: str = ""


@dataclass(frozen=True)
class Score:
    """A system's score on an item by one metric. weight: the item's share in the mean (trained tokens for a loss a token)."""

    metric: str
    score: float
    weight: float = 1.0
    higher_is_better: bool = True


class Suite(Method):
    """Scores systems on items. A method writes `items` and `measure`; keeping, caching, pairing and comparing are done by the stage.

    Class attributes:
        forgetting: the suite measures what the base model could do before, so a gate asks it not to get worse.
        version: raise it when the meaning of a score changes through something else than the suite's own module.
    """

    slot: ClassVar[str] = "evaluate/suites"
    forgetting: ClassVar[bool] = False
    version: ClassVar[int] = 1

    label: str = Field(default="", description="Name in tables and rules; the method's name by default. Needed where one method is used twice.")

    def labels(self) -> list[str]:
        """Names that this suite's results are reported under."""
        return [self.label or self.name()]

    def externals(self, env: Environment) -> dict[str, Any]:
        """Hashes of the files the items come from, other than the rows. See `Stage.externals`."""
        return {}

    @abstractmethod
    def items(self, given: Given) -> list[Item]:
        """Every item, in an order that is always the same. No model is loaded yet. Raises DataError if there are none."""

    @abstractmethod
    def measure(self, system: System, items: Sequence[Item]) -> Iterator[tuple[Item, list[Score]]]:
        """The scores of each of `items` under `system`, as they come. An item that cannot be asked (no trained token) yields an empty list."""

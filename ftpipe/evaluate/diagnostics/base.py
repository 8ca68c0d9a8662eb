"""The base of diagnostics: key numbers with their meaning, a table and plots, from an evaluation's results and the adapters themselves."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.data.rows import RowSet


@dataclass(frozen=True)
class Tuned:
    """An adapter that was evaluated. folder: its files. training: `train.json` of the training that made it, empty where none is known (a merge)."""

    folder: Path
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What a diagnostic may look at.

    items: the table of `items.parquet`. comparisons: the list of `comparisons.json`. model: the base model as the configuration names it.
    adapters: each system that has one (`adapter`, the controls, and `champion` where there is one). progress: call it with (done, total). rows: the rows
    stage of the evaluation, with its held-out split.
    """

    items: pa.Table
    comparisons: list[dict[str, Any]]
    model: str
    adapters: dict[str, Tuned]
    env: Environment
    log: logging.Logger
    progress: Callable[[float, float], None]
    rows: RowSet | None = None


@dataclass(frozen=True)
class Measure:
    """What a key number is. unit: `share` (written as per cent), `count`, `nats per token` and the like, empty where it has none. meaning: how to read it."""

    unit: str
    meaning: str


@dataclass(frozen=True)
class Number:
    """A key number. measure: its name in `Diagnostic.measures`. system: whose it is, empty if nobody's. of: what it was measured on, such as a suite."""

    measure: str
    value: float
    system: str = ""
    of: str = ""


@dataclass(frozen=True)
class Series:
    """Points of a chart. name: a system's name gives them that system's colour. guide: a thin grey line to read the others by, without a key."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = True
    guide: bool = False


@dataclass(frozen=True)
class Chart:
    """Numbers over numbers. x, y: what the axes measure. span: both axes from and to; by default what the points need."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Dots:
    """Values by name, one line below the other. series: for each name of `names` a value, or None. zero: draw a line at zero."""

    title: str
    unit: str
    names: Sequence[str]
    series: dict[str, Sequence[float | None]]
    zero: bool = False


@dataclass
class Finding:
    """What was found.

    words: one or two sentences for a reader who sees nothing else. table: written as `diagnostics/<name>.parquet`; the report shows its beginning, so
    the rows that say most come first. plots: as data; whoever shows them draws them.
    """

    words: str
    numbers: list[Number] = field(default_factory=list)
    table: pa.Table | None = None
    plots: list[Chart | Dots] = field(default_factory=list)

    def number(self, measure: str, system: str = "", of: str = "") -> float:
        """The value of one number. Raises KeyError if it was not found."""
        return {(n.measure, n.system, n.of): n.value for n in self.numbers}[measure, system, of]


class Diagnostic(Method):
    """Explains a result; it decides nothing.

    Class attributes:
        question: what it answers, as a heading.
        measures: its key numbers by name.
    """

    slot: ClassVar[str] = "evaluate/diagnostics"
    question: ClassVar[str] = ""
    measures: ClassVar[dict[str, Measure]] = {}

    def externals(self, env: Environment) -> dict[str, Any]:
        """Hashes of the files it reads beside the evidence. See `Stage.externals`."""
        return {}

    @abstractmethod
    def diagnose(self, evidence: Evidence) -> Finding:
        """Look, and say what was found. The same evidence gives the same finding, tables in an order that does not depend on timing."""

    def record(self, finding: Finding) -> dict[str, Any]:
        """A finding as JSON, with what its numbers mean: question, words, measures, numbers and plots.

        Raises ValueError for a number that is not finite, or of a measure that the diagnostic does not explain.
        """
        for n in finding.numbers:
            if n.measure not in self.measures or not math.isfinite(n.value):
                raise ValueError(f"diagnostic {self.name()}: {n.measure!r} is {n.value}, and known measures are {', '.join(self.measures)}")
        used = dict.fromkeys(n.measure for n in finding.numbers)
        return {"question": self.question, "words": finding.words, "measures": {name: asdict(self.measures[name]) for name in used},
                "numbers": [asdict(n) for n in finding.numbers], "plots": [{"kind": type(p).__name__.lower()} | asdict(p) for p in finding.plots]}

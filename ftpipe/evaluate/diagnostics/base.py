"""The base of diagnostics: numbers, a table and perhaps a plot, from an evaluation's results and the adapters themselves."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.artifacts import Artifact
    from ftpipe.data.rows import RowSet


@dataclass(frozen=True)
class Evidence:
    """What a diagnostic may look at.

    items: the table of `items.parquet`. comparisons: the list of `comparisons.json`. model: the base model as the configuration names it.
    adapters: artifact of each system that has one (`adapter` and the controls). progress: call it with (done, total). rows: the rows stage of the
    evaluation, with its held-out split.
    """

    items: pa.Table
    comparisons: list[dict[str, Any]]
    model: str
    adapters: dict[str, Artifact]
    env: Environment
    log: logging.Logger
    progress: Callable[[float, float], None]
    rows: RowSet | None = None


@dataclass
class Finding:
    """What was found. numbers: by name, finite. table: written as `diagnostics/<name>.parquet`. plot: SVG text, written as `diagnostics/<name>.svg`."""

    numbers: dict[str, float] = field(default_factory=dict)
    table: pa.Table | None = None
    plot: str | None = None


class Diagnostic(Method):
    """Explains a result; it decides nothing."""

    slot: ClassVar[str] = "evaluate/diagnostics"

    def externals(self, env: Environment) -> dict[str, Any]:
        """Hashes of the files it reads beside the evidence. See `Stage.externals`."""
        return {}

    @abstractmethod
    def diagnose(self, evidence: Evidence) -> Finding:
        """Look, and say what was found. The same evidence gives the same finding, tables in an order that does not depend on timing."""

"""What all curation steps share: the base class, the context they run in, and the one place that writes what they decided."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.data.rows import RowSet, write_annotations
from ftpipe.errors import DataError, FtpipeError
from ftpipe.slots import Method
from ftpipe.stages.base import Environment, StageContext

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import pyarrow as pa


@dataclass
class StepContext(StageContext):
    """A stage context, and what only curation steps need.

    Attributes:
        method: the method's name.
        model: base model as written in the configuration; empty for a step that does not set `uses_model`.
        seed: seed; 0 for a step that does not set `uses_seed`.
    """

    method: str = ""
    model: str = ""
    seed: int = 0

    def generator(self, *words: str | int) -> np.random.Generator:
        """A generator of random numbers that depends on the seed, the method and `words` alone."""
        import numpy as np

        text = "\x1f".join(map(str, (self.seed, self.method, *words)))
        return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")))

    def annotate(self, table: pa.Table) -> None:
        """Write annotations: row_id and further columns (`RowSet.annotation` finds them downstream). Any step may; once."""
        write_annotations(self.out, table.sort_by("row_id"))

    def report(self, values: dict[str, Any]) -> None:
        """Write `<method>.json`, the numbers and examples that the report shows of this step."""
        text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (self.out / f"{self.method}.json").write_text(text + "\n", encoding="utf-8")


class CurateStep(Method):
    """Base of all curation methods; each sub-slot's base leaves one method to write and calls `conclude` with its answer.

    A step sees the train rows. Held-out rows pass through untouched and are never decided on; a step that wants to read them asks for
    `rows.table("heldout")`. What earlier steps decided on order and repetition survives: `times` multiply, order changes only by an orderer.

    A step may read the artifact of any other stage through a field of type `Ref`: `ctx.inputs[self.target]`.
    """

    uses_model: ClassVar[bool] = False
    """The step reads `ctx.model`: its identity enters the step's key."""
    uses_seed: ClassVar[bool] = False
    """The step reads `ctx.seed` or `ctx.generator`: the seed enters the step's key."""

    def externals(self, env: Environment) -> dict[str, Any]:
        """Hashes of what the step reads from outside its inputs beside `ctx.model`: a table, another model. See `Stage.externals`."""
        return {}

    @abstractmethod
    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        """Decide on the train rows of `rows` and hand the answer to `conclude`."""

    def conclude(self, rows: RowSet, ctx: StepContext, verdicts: pa.Table, *, made: Iterable[dict[str, Any]] = ()) -> None:
        """Write `kept.parquet`, `decisions.parquet` and, for new rows, `rows.parquet` and `parents.parquet`.

        Args:
            rows: the rows before this step.
            verdicts: row_id and any of: kept (bool, true), reason (text, for a dropped row), score (number), keeper (row_id that stays in a
                dropped row's place), times (whole number that multiplies the row's repetition, 1; 0 drops it), key (anything that sorts:
                train rows are put in ascending order of it, equal ones as they were). Train rows that it leaves out are kept.
            made: new rows, see `Synthesizer.make`; they come after all others, or in the place of the row they replace.

        Raises:
            DataError: if no train row came in, or none is left.
            FtpipeError: if the verdicts name a row twice or one that is no train row here, or drop one without a reason.
        """
        from ftpipe.curate.verdicts import write

        write(self, rows, ctx, verdicts, made)

    def fault(self, what: str) -> FtpipeError:
        """The error for an answer that breaks the slot's contract."""
        return FtpipeError(f"{self.slot}/{self.name()} {what}", remedy="this is a fault in the method; please report it")

    def tokens(self, rows: RowSet) -> pa.Table:
        """Tokens of each row as the model sees it (row_id, tokens), as counted by the label audit. Raises DataError if nobody counted."""
        table = rows.annotation("tokens")
        if table is None:
            raise DataError("the tokens of the rows are not known", where=f"{self.slot}/{self.name()}",
                            remedy="put a label_audit stage before this one, or give the budget in rows")
        return table


def connection(rows: RowSet, ctx: StepContext):
    """A DuckDB connection (context manager) with the view `rows`, spilling into the stage's own work folder.

    `with connection(rows, ctx) as con: con.sql("select row_id from rows where split = 'train'")`
    """
    from contextlib import contextmanager

    from ftpipe.tables import connect

    @contextmanager
    def opened() -> Iterable[duckdb.DuckDBPyConnection]:
        ctx.work.mkdir(parents=True, exist_ok=True)
        with connect(ctx.work) as con:
            rows.register(con)
            yield con

    return opened()

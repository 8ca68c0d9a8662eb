"""Rows at random, without replacement: the control that any other selection has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.curate.draw import uniforms
from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Random(Selector):
    """Uniform sampling without replacement to a budget.

    Each row has a number drawn from the seed and its row_id, and rows are taken in the order of these numbers: the choice does not depend on
    the order or number of shards, and a larger budget of rows keeps the rows of a smaller one.
    """

    uses_seed = True

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np

        limit = self.limit(rows, ctx)
        ids = limit.cost["row_id"]
        order = np.lexsort((np.arange(len(ids)), uniforms(ids, ctx.seed, self.name())))
        taken = limit.first(order)
        return limit.cost.take(np.sort(taken)).select(["row_id"])

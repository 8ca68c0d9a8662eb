"""A seeded shuffle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.curate.draw import uniforms
from ftpipe.curate.order.base import Orderer
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Shuffle(Orderer):
    """Rows in the order of a number drawn for each from the seed and its row_id: the same rows come in the same order, however they came."""

    uses_seed = True

    def position(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import pyarrow as pa

        ids = rows.table(columns=["row_id"])["row_id"]
        return pa.table({"row_id": ids, "key": uniforms(ids, ctx.seed, self.name())})

"""Scarce sources last: first the plenty alone, then both together."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.curate.draw import uniforms
from ftpipe.curate.labels import labels
from ftpipe.curate.order.base import Orderer
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import TRAIN, RowSet
from ftpipe.errors import DataError, nearest

if TYPE_CHECKING:
    import pyarrow as pa


class HighResourceFirst(Orderer):
    """Puts all rows of the `low` sources into the last part of the epoch, where they are `rate` of the rows, evenly spread; before it come rows of the other
    sources alone.

    The scarce sources are seen with the same weight in fewer steps, at the end, where static weights would show them throughout. Which of the other sources'
    rows come first, and the order inside each part, is drawn from the seed. Training follows the order with `shuffle: false` and one epoch only. A row that is
    repeated is seen several times on end: put mixing that repeats rows elsewhere.
    """

    paper: ClassVar[str] = "Order Matters in the Presence of Dataset Imbalance for Multilingual Learning"
    uses_seed = True

    low: list[str] = Field(min_length=1, description="Sources that are held back.")
    by: str = Field(default="source", description="What a source is: source, group, format, or an annotation of an earlier step.")
    rate: float = Field(default=0.5, gt=0, le=1, description="Share of the second part's rows that are of the sources held back.")

    def position(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        table = labels(rows, self.by, TRAIN, f"{ctx.name} (high_resource_first.by)")
        found = table["label"].to_pylist()
        for name in self.low:
            if name not in found:
                raise DataError(f"there is no source {name!r}", where=f"{ctx.name} (high_resource_first.low)", remedy=nearest(name, set(found)))
        times = rows.table(columns=["row_id", "times"]).sort_by("row_id")["times"].to_numpy()
        held_back = np.isin(np.array(found, dtype=object), self.low)
        order = np.argsort(uniforms(table["row_id"], ctx.seed, self.name()), kind="stable")
        low, high = order[held_back[order]], order[~held_back[order]]
        scarce = int(times[low].sum())
        beside = round(scarce * (1 - self.rate) / self.rate)  # of the others, in the second part
        plenty = int(times[high].sum())
        if beside > plenty:
            raise DataError(f"{beside:,} rows of other sources are needed beside the {scarce:,} held back, there are {plenty:,}",
                            where=f"{ctx.name} (high_resource_first.rate)", remedy=f"set a rate of at least {scarce / (scarce + plenty):.3g}")
        second = np.cumsum(times[high]) > plenty - beside
        key = np.empty(len(order))
        key[high[~second]] = np.arange((~second).sum()) - len(order)
        for part in (high[second], low):  # the middle of each row's stretch, as a share of its side: so both sides advance together
            key[part] = (np.cumsum(times[part]) - times[part] / 2) / max(times[part].sum(), 1)
        ctx.report({"first_part": plenty - int(times[high[second]].sum()), "second_part": scarce + int(times[high[second]].sum()), "held_back": scarce})
        return pa.table({"row_id": table["row_id"], "key": pa.array(key)})

"""Rows at random that are as long as those another stage chose: the control for selections that favour a length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ftpipe.curate.budget import costs
from ftpipe.curate.draw import uniforms
from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class LengthMatchedRandom(Selector):
    """Uniform sampling without replacement inside bins of length, each filled with as many tokens as the reference stage has in it.

    The reference is the stage of `budget: {like: STAGE}`. The bins are cut at quantiles of its rows' lengths, so that each holds about the
    same number of its rows; rows shorter or longer than all of them are never taken. Bins are filled from the longest to the shortest, and
    what no row of a bin fits in any more is offered to the next one: the total is at most the budget, and below it by less than a short row.
    """

    uses_seed = True

    bins: int = Field(default=20, ge=1, description="Number of bins of length.")

    @model_validator(mode="after")
    def _like(self) -> LengthMatchedRandom:
        if self.budget is None or self.budget.like is None or self.budget.counted != "tokens":
            raise ValueError("give the stage whose lengths are matched as `budget: {like: STAGE}`, counted in tokens")
        return self

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np

        limit = self.limit(rows, ctx)
        reference = costs(RowSet(ctx.inputs[self.budget.like]), ctx, self, "tokens")
        pool, ids, given = limit.cost["cost"].to_numpy(), limit.cost["row_id"], reference["length"].to_numpy()
        edges = np.unique(np.quantile(given, np.linspace(0, 1, self.bins + 1)[1:-1], method="lower"))
        lengths = limit.cost["length"].to_numpy()
        of_reference, of_pool = np.searchsorted(edges, given), np.searchsorted(edges, lengths)
        of_pool[(lengths < given.min()) | (lengths > given.max())] = -1
        wanted_by_bin = np.bincount(of_reference, weights=reference["cost"].to_numpy(), minlength=len(edges) + 1).astype(np.int64).tolist()
        order = np.lexsort((np.arange(len(ids)), uniforms(ids, ctx.seed, self.name())))
        taken, lines, over = [], [], 0
        for b, wanted in reversed(list(enumerate(wanted_by_bin))):
            these = order[of_pool[order] == b]
            there = int(pool[these].sum())
            if there < wanted and not self.budget.at_most:
                raise DataError(f"{self.budget.like} holds {wanted:,} tokens in rows of bin {b} of {len(edges) + 1}, here are only {there:,} in such rows",
                                where=f"{ctx.name} ({self.name()})", remedy="use fewer bins, or set at_most: true in the budget")
            got = these[limit.take(pool[these], wanted + over)]
            over += wanted - int(pool[got].sum())
            taken.append(got)
            lines.append({"longest": int(edges[b]) if b < len(edges) else None, "wanted_tokens": wanted, "tokens": int(pool[got].sum()),
                          "wanted_rows": int((of_reference == b).sum()), "rows": len(got)})
        ctx.report({"bins": lines[::-1]})
        return limit.cost.take(np.sort(np.concatenate(taken))).select(["row_id"])

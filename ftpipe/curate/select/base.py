"""The base of selectors."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from ftpipe.curate.budget import Budget, Limit
from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Selector(CurateStep):
    """Chooses rows up to a budget. A subclass writes `choose`; the base checks that the budget was met.

    A selector that decides by something else than an amount (the best answer of each group) sets `needs_budget = False`.
    """

    slot: ClassVar[str] = "curate/select"
    needs_budget: ClassVar[bool] = True
    reason: ClassVar[str] = "not selected"
    """What the decisions say of a row left out, unless the table has a `reason` for it."""

    budget: Budget | None = Field(default=None, description="How much to choose: {tokens: N}, {rows: N}, {share: 0.2} or {like: STAGE}.")

    @model_validator(mode="after")
    def _has_budget(self) -> Selector:
        if self.needs_budget and self.budget is None:
            raise ValueError(f"{self.name()} needs a budget: {{tokens: N}}, {{rows: N}}, {{share: 0.2}} or {{like: STAGE}}")
        return self

    @abstractmethod
    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """The chosen train rows: row_id, times (how often it was drawn), score (number or null), perhaps reason and keeper.

        Rows left out are dropped; list them with times 0 to give their score or a reason. `self.limit(rows, ctx)` gives the budget in
        numbers, and `limit.take(costs)` fills it from rows in an order.
        """

    def limit(self, rows: RowSet, ctx: StepContext) -> Limit:
        """The budget in numbers, with the cost of each train row. Raises DataError for a budget larger than the data."""
        if self.budget is None:
            raise self.fault("asked for a budget that was not given")
        return self.budget.resolve(rows, ctx, self)

    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        chosen = self.choose(rows, ctx)
        if "times" not in chosen.column_names:
            chosen = chosen.append_column("times", pa.array([1] * chosen.num_rows, pa.int64()))
        if self.budget is not None:
            limit = self.limit(rows, ctx)
            used = limit.used(chosen)
            if used > limit.amount:
                raise self.fault(f"chose {used} {limit.unit} for a budget of {limit.amount}")
            ctx.counts[f"budget_{limit.unit}"], ctx.counts[f"used_{limit.unit}"] = limit.amount, used
            ctx.log.info("%d of a budget of %d %s used", used, limit.amount, limit.unit)
        rest = pa.table({"row_id": rows.table(columns=["row_id"])["row_id"]})
        rest = rest.filter(pc.invert(pc.is_in(rest["row_id"], value_set=chosen["row_id"].combine_chunks())))
        rest = rest.append_column("times", pa.array([0] * rest.num_rows, chosen.schema.field("times").type))
        table = pa.concat_tables([chosen, rest], promote_options="default")
        left_out = pc.equal(table["times"], 0)
        reason = pc.if_else(left_out, self.reason, pa.scalar(None, pa.string()))
        if "reason" in table.column_names:
            reason = pc.coalesce(table["reason"].cast(pa.string()), reason)
            table = table.drop_columns("reason")
        self.conclude(rows, ctx, table.append_column("reason", reason))

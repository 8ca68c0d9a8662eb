"""How much a selector may choose: one model of budgets for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftpipe.curate.step import CurateStep, StepContext, connection
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


class Budget(BaseModel):
    """An amount of tokens or rows: exactly one of `tokens`, `rows`, `share`, `like`.

    A row that earlier steps made an epoch show several times costs its tokens (or 1) as many times.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int | None = Field(default=None, gt=0, description="This many tokens, as the label audit counted them.")
    rows: int | None = Field(default=None, gt=0, description="This many rows.")
    share: float | None = Field(default=None, gt=0, le=1, description="This share of what there is, in `unit`.")
    like: Ref | None = Field(default=None, description="As much as the train rows of this stage hold, in `unit`.")
    unit: Literal["tokens", "rows"] = Field(default="tokens", description="What `share` and `like` count.")
    at_most: bool = Field(default=False, description="Take everything if there is less than the budget, instead of stopping with an error.")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [n for n in ("tokens", "rows", "share", "like") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget has exactly one of tokens, rows, share and like, this one has {' and '.join(given) or 'none'}")
        return self

    @property
    def counted(self) -> str:
        """What this budget counts: `tokens` or `rows`."""
        return "tokens" if self.tokens else "rows" if self.rows else self.unit

    def resolve(self, rows: RowSet, ctx: StepContext, step: CurateStep) -> Limit:
        """The budget in numbers for these rows.

        Raises:
            DataError: for a budget larger than the data (unless `at_most`), one too small for any row, or tokens that nobody counted.
        """
        cost = costs(rows, ctx, step, self.counted)
        available = sum_of(cost)
        if self.like is not None:
            amount = sum_of(costs(RowSet(ctx.inputs[self.like]), ctx, step, self.counted))
        elif self.share is not None:
            amount = int(self.share * available)
        else:
            amount = self.tokens or self.rows or 0
        if amount > available:
            if not self.at_most:
                raise DataError(f"the budget of {amount:,} {self.counted} is larger than the data: there are {available:,} {self.counted} in "
                                f"{cost.num_rows:,} train rows", where=f"{ctx.name} ({step.name()}.budget)",
                                remedy=f"ask for at most {available}, or set at_most: true to take everything")
            amount = available
        return Limit(amount, self.counted, available, cost)


@dataclass(frozen=True)
class Limit:
    """A budget in numbers.

    Attributes:
        amount: most that may be chosen, in `unit`.
        unit: `tokens` or `rows`.
        available: what all train rows hold together.
        cost: row_id, length (tokens, or 1) and cost (length times its repetition; int64) of each train row, in ascending order of row_id.
    """

    amount: int
    unit: str
    available: int
    cost: pa.Table

    def take(self, costs: np.ndarray, amount: int | None = None) -> np.ndarray:
        """Which items of an order to take, see `fill`. amount: fill this much, instead of the whole budget."""
        return fill(costs, self.amount if amount is None else amount)

    def first(self, order: np.ndarray) -> np.ndarray:
        """What `take` takes of rows in the order of preference: (n,) positions in `cost`, a part of which comes back."""
        return order[self.take(self.cost["cost"].to_numpy()[order])]

    def used(self, chosen: pa.Table) -> int:
        """What `chosen` (row_id, times) costs."""
        import pyarrow.compute as pc

        joined = chosen.select(["row_id", "times"]).join(self.cost.select(["row_id", "cost"]), "row_id", join_type="inner")
        return pc.sum(pc.multiply(joined["times"].cast("int64"), joined["cost"])).as_py() or 0


def fill(costs: np.ndarray, amount: int) -> np.ndarray:
    """Which items of an order to take so that their costs come to at most `amount`: indices into `costs`, ascending.

    Items are taken from the front until the next one would exceed the amount; what is left is then offered to the items after it, in
    order, and each that still fits is taken. So the sum never exceeds the amount, and no item that was passed over would fit.

    Args:
        costs: (n,) cost of each item in the order of preference. An item may be a row drawn again.
    """
    import numpy as np

    costs = np.asarray(costs, dtype=np.int64)
    total = np.cumsum(costs)
    front = int(np.searchsorted(total, amount, side="right"))
    left = amount - (int(total[front - 1]) if front else 0)
    taken = [np.arange(front)]
    start, step = front, 4096
    while start < len(costs) and left > 0:
        for i in start + np.flatnonzero(costs[start:start + step] <= left):
            if costs[i] <= left:
                taken.append(np.array([i]))
                left -= int(costs[i])
        start += step
    return np.concatenate(taken).astype(np.int64)


def costs(rows: RowSet, ctx: StepContext, step: CurateStep, unit: str) -> pa.Table:
    """row_id, length and cost of each train row, see `Limit.cost`."""
    with connection(rows, ctx) as con:
        if unit == "rows":
            return con.sql("select row_id, 1::bigint as length, times::bigint as cost from rows where split = 'train' order by row_id").to_arrow_table()
        con.register("counted", step.tokens(rows))
        table = con.sql("select row_id, tokens::bigint as length, (times * tokens)::bigint as cost from rows left join counted "
                        "using (row_id) where split = 'train' order by row_id").to_arrow_table()
    if table["cost"].null_count:
        import pyarrow.compute as pc

        missing = table.filter(pc.is_null(table["cost"]))["row_id"][0]
        raise DataError(f"the tokens of {table['cost'].null_count} rows are not known, row {missing} among them", where=ctx.name,
                        remedy="put a label_audit stage after the step that made them, or give the budget in rows")
    return table


def sum_of(cost: pa.Table) -> int:
    """Sum of the column `cost`."""
    import pyarrow.compute as pc

    return pc.sum(cost["cost"]).as_py() or 0

"""What mixing by source shares: what the sources hold, what each is to give, and the whole numbers of times each row is shown for that."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ftpipe.curate.budget import costs, fill
from ftpipe.curate.draw import uniforms
from ftpipe.curate.labels import labels
from ftpipe.curate.mix.base import Mixer
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import TRAIN, RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

@dataclass(frozen=True)
class Sources:
    """The n train rows by source.

    ids: row ids, ascending. names: the k sources, ascending. of: (n,) each row's source, as index into `names`. cost: (n,) int64, rows or tokens that
    one showing of the row takes, what earlier steps decided on repetition counted. size: (k,) int64, their sums. told: further numbers for the report; a
    method adds what it found.
    """

    ids: pa.ChunkedArray
    names: list[str]
    of: np.ndarray
    cost: np.ndarray
    size: np.ndarray
    told: dict[str, Any] = field(default_factory=dict)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(k,) int64 sums by source of (n,) whole numbers."""
        import numpy as np

        return np.bincount(self.of, weights=values, minlength=len(self.names)).astype(np.int64)


class SourceMixer(Mixer):
    """Decides how much of each source an epoch shows. A subclass writes `wanted`.

    Every row of a source that gives m of the n it holds is shown floor(m / n) times, and rows drawn by the seed once more while they fit. A draw belongs
    to the row, not to its place, so more of a source holds what less of it held.
    """

    uses_seed = True

    by: str = Field(default="source", description="What a source is: source, group, format, or an annotation of an earlier step.")
    unit: Literal["rows", "tokens"] = Field(default="rows", description="What sizes, caps, shares and amounts count; tokens as the label audit counted them.")

    @abstractmethod
    def wanted(self, sources: Sources, ctx: StepContext) -> np.ndarray:
        """(k,) int64: what each source is to give, in `unit`."""

    def purpose(self) -> tuple[str | int, ...]:
        """Words that the draw of rows depends on beside the seed."""
        return (self.name(),)

    def times(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        sources = self._sources(rows, ctx)
        wanted = self.wanted(sources, ctx)
        empty = np.flatnonzero((wanted > 0) & (sources.size == 0))
        if len(empty):
            raise DataError(f"source {sources.names[empty[0]]!r} holds no {self.unit}", where=f"{ctx.name} ({self.name()})", remedy="leave it out")
        times = spread(sources, wanted, uniforms(sources.ids, ctx.seed, *self.purpose()))
        ctx.report({"unit": self.unit, "sources": self._summary(rows, sources, wanted, times)} | sources.told)
        return pa.table({"row_id": sources.ids, "times": pa.array(times), "score": pa.array((wanted / np.maximum(sources.size, 1))[sources.of])})

    def _summary(self, rows: RowSet, sources: Sources, wanted: np.ndarray, times: np.ndarray) -> list[dict[str, Any]]:
        """Each source: what it holds, was to give and gives, in `unit`; and what that is in rows, and in tokens where a label audit counted them."""
        import numpy as np
        import pyarrow.compute as pc

        shown = sources.sums(times * sources.cost)
        repeated = rows.table(columns=["row_id", "times"]).sort_by("row_id")["times"].to_numpy()
        in_rows = sources.sums(times * repeated)
        tokens = rows.annotation("tokens")
        in_tokens = None
        if tokens is not None:
            at = pc.index_in(sources.ids, value_set=tokens["row_id"].combine_chunks())
            length = tokens["tokens"].take(at)
            if not length.null_count:
                in_tokens = sources.sums(times * repeated * length.to_numpy())
        total = [max(int(np.sum(v)), 1) if v is not None else 1 for v in (wanted, in_rows, in_tokens)]
        return [{"source": name, "holds": int(sources.size[i]), "share": int(wanted[i]) / total[0], "wanted": int(wanted[i]), "shown": int(shown[i]),
                 "rows": int(in_rows[i]), "row_share": int(in_rows[i]) / total[1]}
                | ({} if in_tokens is None else {"tokens": int(in_tokens[i]), "token_share": int(in_tokens[i]) / total[2]})
                for i, name in enumerate(sources.names)]

    def _sources(self, rows: RowSet, ctx: StepContext) -> Sources:
        import numpy as np

        cost = costs(rows, ctx, self, self.unit)["cost"].to_numpy()
        table = labels(rows, self.by, TRAIN, f"{ctx.name} ({self.name()}.by)")
        encoded = table["label"].combine_chunks().dictionary_encode()
        found = encoded.dictionary.to_pylist()
        names = sorted(found)
        place = {name: i for i, name in enumerate(names)}
        of = np.array([place[name] for name in found])[encoded.indices.to_numpy()]
        return Sources(table["row_id"], names, of, cost, np.bincount(of, weights=cost, minlength=len(names)).astype(np.int64))


class ShareMixer(SourceMixer):
    """Gives each source a share of the epoch. A subclass writes `shares`; what each source gives is made whole by largest remainder."""

    total: float | None = Field(default=None, gt=0, description="Size of the epoch, relative to what there is; 1 if `amount` is not set either.")
    amount: int | None = Field(default=None, gt=0, description="Size of the epoch, in `unit`.")

    @model_validator(mode="after")
    def _one_size(self) -> ShareMixer:
        if self.total is not None and self.amount is not None:
            raise ValueError("set one of total and amount")
        return self

    @abstractmethod
    def shares(self, sources: Sources, ctx: StepContext) -> np.ndarray:
        """(k,) numbers of at least 0, not all 0; the base divides them by their sum."""

    def usual(self, sources: Sources) -> int:
        """Size of the epoch, in `unit`, if neither total nor amount is set."""
        return int(sources.size.sum())

    def epoch(self, sources: Sources) -> int:
        """Size of the epoch, in `unit`."""
        if self.total is not None:
            return round(float(sources.size.sum()) * self.total)
        return self.amount or self.usual(sources)

    def wanted(self, sources: Sources, ctx: StepContext) -> np.ndarray:
        shares = self.shares(sources, ctx)
        return largest_remainder(shares / shares.sum() * self.epoch(sources), sources.names)


class RateMixer(ShareMixer):
    """Gives each source a share that follows from its size. A subclass writes `rates`."""

    weights: dict[str, float] = Field(default_factory=dict, description="Factor by source, 1 for those not named; 0 leaves a source out.")

    @abstractmethod
    def rates(self, size: np.ndarray) -> np.ndarray:
        """(k,) rates of sources of these sizes (k,), to be multiplied by the weights."""

    def shares(self, sources: Sources, ctx: StepContext) -> np.ndarray:
        import numpy as np

        unknown = set(self.weights) - set(sources.names)
        if unknown or any(w < 0 for w in self.weights.values()):
            raise DataError(f"weights name {sorted(unknown)}, or are negative; the sources are {sources.names[:20]}",
                            where=f"{ctx.name} ({self.name()}.weights)")
        shares = self.rates(sources.size) * np.array([self.weights.get(name, 1.0) for name in sources.names])
        if not shares.sum():
            raise DataError("every source has the weight 0", where=f"{ctx.name} ({self.name()}.weights)")
        return shares


def spread(sources: Sources, wanted: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(n,) int64: how often each row is shown so that each source gives `wanted` (k,), or as little less as its rows allow; draws: (n,) ranks its rows."""
    import numpy as np

    passes = wanted // np.maximum(sources.size, 1)
    times = passes[sources.of].astype(np.int64)
    order = np.lexsort((draws, sources.of))
    begins = np.searchsorted(sources.of[order], np.arange(len(sources.names) + 1))
    for i, rest in enumerate((wanted - passes * sources.size).tolist()):
        these = order[begins[i]:begins[i + 1]]
        times[these[fill(sources.cost[these], rest)]] += 1
    return times


def largest_remainder(amounts: np.ndarray, names: list[str]) -> np.ndarray:
    """Whole numbers (int64) that sum to the rounded sum of `amounts`: each rounded down, then one more for the largest fractions (ties by name)."""
    import numpy as np

    whole = np.floor(amounts + 1e-9).astype(np.int64)
    missing = round(float(amounts.sum())) - int(whole.sum())
    fraction = np.round(amounts - whole, 9)
    order = sorted(range(len(names)), key=lambda i: (-fraction[i], names[i]))
    for i in order[:missing]:
        whole[i] += 1
    return whole

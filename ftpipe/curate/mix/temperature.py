"""Shares of sources: proportional to their size, flattened by a temperature, capped, or given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ftpipe.curate.draw import uniforms
from ftpipe.curate.mix.base import Mixer
from ftpipe.curate.step import StepContext, connection
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


class Temperature(Mixer):
    """Gives source i a share of the epoch proportional to weight_i * min(n_i, cap)^(1 / temperature), n_i its number of rows.

    T5 (Raffel et al., 2020, section 3.5.2) calls this examples-proportional (temperature 1, with a cap) and temperature-scaled mixing. The
    epoch holds `total` times as many rows as there are; the rows of each source are whole numbers by largest remainder, and so are the
    times of each row: each is shown floor(m_i / n_i) times, and rows drawn by the seed once more. A draw belongs to the row, not its place.
    """

    uses_seed = True

    by: str = Field(default="source", description="What a source is: source, group, format, or an annotation of an earlier step.")
    temperature: float = Field(default=1.0, gt=0, description="1: in proportion to size; larger: more equal; large (1000): equal.")
    cap: int | None = Field(default=None, ge=1, description="Rows that a source counts for at most.")
    weights: dict[str, float] = Field(default_factory=dict, description="Factor by source, 1 for those not named; 0 leaves a source out.")
    total: float = Field(default=1.0, gt=0, description="Size of the epoch, relative to the rows there are.")

    def times(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        table = self._sources(rows, ctx)
        ids = table["row_id"]
        source = table["source"].combine_chunks().dictionary_encode()
        names, of = source.dictionary.to_pylist(), source.indices.to_numpy()
        unknown = set(self.weights) - set(names)
        if unknown or any(w < 0 for w in self.weights.values()):
            raise DataError(f"weights name {sorted(unknown)}, or are negative; the sources are {sorted(names)[:20]}", where=f"{ctx.name} (temperature.weights)")
        shown = table["times"].to_numpy()
        n = np.bincount(of, weights=shown, minlength=len(names))
        size = np.minimum(n, self.cap) if self.cap else n
        share = size ** (1 / self.temperature) * np.array([self.weights.get(name, 1.0) for name in names])
        if not share.sum():
            raise DataError("every source has the weight 0", where=f"{ctx.name} (temperature.weights)")
        share = share / share.sum()
        wanted = largest_remainder(share * round(float(n.sum()) * self.total), names)
        base = (wanted // n).astype(np.int64)
        times = base[of]
        extra = (wanted - base * n).astype(np.int64)
        order = np.lexsort((np.arange(len(ids)), uniforms(ids, ctx.seed, self.name()), of))
        begins = np.searchsorted(of[order], np.arange(len(names) + 1))
        for i in range(len(names)):  # rows in the order of their draws, while they fit
            these = order[begins[i]:begins[i + 1]]
            times[these[np.cumsum(shown[these]) <= extra[i]]] += 1
        got = np.bincount(of, weights=times * shown, minlength=len(names))
        ctx.report({"sources": [{"source": names[i], "rows": int(n[i]), "share": float(share[i]), "wanted": int(wanted[i]), "shown": int(got[i])}
                                for i in np.argsort(np.array(names, dtype=object))]})
        return pa.table({"row_id": ids, "times": pa.array(times), "score": pa.array(share[of] / n[of])})

    def _sources(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """row_id, source (text), times, in ascending order of row_id."""
        with connection(rows, ctx) as con:
            if self.by in ("source", "group", "format"):
                query = f'select row_id, "{self.by}" as source, times from rows'
            else:
                table = rows.annotation(self.by)
                if table is None:
                    raise DataError(f"no step before this one annotates {self.by!r}", where=f"{ctx.name} (temperature.by)",
                                    remedy="use source, group or format")
                con.register("labels", table)
                query = f'select row_id, coalesce("{self.by}"::varchar, \'\') as source, times from rows left join labels using (row_id)'
            return con.sql(f"{query} where split = 'train' order by row_id").to_arrow_table()


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

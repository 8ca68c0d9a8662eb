"""Indicators of a row's quality that can be computed without a judge: lengths, perplexity, lexical diversity, distance to neighbours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ftpipe.curate.step import StepContext, connection
from ftpipe.curate.text import row_text
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pyarrow as pa

WORD = re.compile(r"\w+")
NEIGHBOUR = re.compile(r"knn_([1-9]\d*)")
SCORED = ("input_length", "output_length", "perplexity")
FACTOR = 0.72
"""Type-token ratio at which a factor of MTLD is full (McCarthy and Jarvis 2010)."""


def mtld(text: str) -> float:
    """Measure of textual lexical diversity: mean length in words of stretches that hold a ratio of different to all words above 0.72, the mean of a
    reading forwards and one backwards; 0 without a word. What is left at the end counts as the part of a stretch that it is."""
    words = WORD.findall(text.lower())
    return (_stretch(words) + _stretch(words[::-1])) / 2 if words else 0.0


def _stretch(words: Sequence[str]) -> float:
    factors, count = 0.0, 0
    seen: set[str] = set()
    for word in words:
        count += 1
        seen.add(word)
        if len(seen) / count <= FACTOR:
            factors, count = factors + 1, 0
            seen.clear()
    if count:
        factors += (1 - len(seen) / count) / (1 - FACTOR)
    return len(words) / factors if factors else float(len(words))


def neighbour_distances(points: np.ndarray, which: int) -> np.ndarray:
    """(n,) Euclidean distance of each of (n, d) points to its `which`-th nearest other one, found exactly; NaN with too few points."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    if len(points) <= which:
        return np.full(len(points), np.nan)
    with threadpool_limits(limits=1):  # the same last bits in every run
        return NearestNeighbors(n_neighbors=which, algorithm="brute").fit(points).kneighbors(return_distance=True)[0][:, -1]


def indicators(names: Sequence[str], rows: RowSet, ctx: StepContext) -> tuple[pa.ChunkedArray, dict[str, np.ndarray]]:
    """Row ids of the train rows, ascending, and for each name (n,) float64, NaN where it is not known.

    input_length, output_length: tokens that are not trained on, and that are. perplexity: exp of the mean loss of an answer's token. mtld: of the answer.
    knn_i: distance to the i-th nearest other train row, between embeddings (mean last hidden state) of length 1. Any other name is an annotation of an
    earlier step. Raises DataError for one that is none.
    """
    import numpy as np

    found: dict[str, np.ndarray] = {}
    near = {n: int(m[1]) for n in names if (m := NEIGHBOUR.fullmatch(n))}
    ids = rows.table(columns=["row_id"]).sort_by("row_id")["row_id"]
    if near or set(names) & set(SCORED):
        found |= _scored(names, near, rows, ctx)
    if "mtld" in names:
        with connection(rows, ctx) as con:
            texts = con.sql(f"select {row_text('answer')} as said from rows where split = 'train' order by row_id").to_arrow_table()["said"].to_pylist()
        found["mtld"] = np.array([mtld(t or "") for t in texts])
    for name in names:
        if name not in found:
            found[name] = _annotated(name, rows, ctx)
    return ids, {n: found[n] for n in names}


def _scored(names: Sequence[str], near: dict[str, int], rows: RowSet, ctx: StepContext) -> dict[str, np.ndarray]:
    """Those that the model tells."""
    import numpy as np

    from ftpipe.models.scores import score_rows

    want = (*(["loss"] if "perplexity" in names else []), *(["embedding"] if near else []))
    table = score_rows(rows, ctx, model=ctx.model, want=want or ("embedding",))
    answer = table["trained_tokens"].fill_null(0).to_numpy().astype(np.float64)
    known = answer > 0
    found = {"input_length": np.where(known, table["tokens"].fill_null(0).to_numpy() - answer, np.nan), "output_length": np.where(known, answer, np.nan)}
    if "perplexity" in names:
        found["perplexity"] = np.exp(table["loss"].to_numpy())
    if near:
        points = np.stack(table["embedding"].take(np.flatnonzero(known)).to_numpy().tolist()).astype(np.float64) if known.any() else np.zeros((0, 1))
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        for name, which in near.items():
            found[name] = np.full(len(known), np.nan)
            found[name][known] = neighbour_distances(points, which)
    return found


def _annotated(name: str, rows: RowSet, ctx: StepContext) -> np.ndarray:
    import numpy as np

    table = rows.annotation(name)
    if table is None:
        raise DataError(f"the indicator {name!r} is none that can be computed here, and no step before this one annotates it",
                        where=f"{ctx.name} ({ctx.method})",
                        remedy=f"annotate it by a step before this one, or use {', '.join(SCORED)}, mtld and knn_6, and fit the rule to them (`runs`)")
    with connection(rows, ctx) as con:
        con.register("annotated", table)
        values = con.sql(f'select a."{name}"::double as value from rows left join annotated a using (row_id) where split = \'train\' order by row_id')
        return np.array([np.nan if v is None else v for v in values.to_arrow_table()["value"].to_pylist()], dtype=np.float64)

"""Rows that mean the same, by their embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from ftpipe.curate.dedup.base import Dedup
from ftpipe.curate.step import StepContext, connection
from ftpipe.data.rows import TRAIN, RowSet

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ROUNDING = 1e-4
"""More than a cosine in float32 is off by; a pair this close to the threshold is looked at again in float64."""


def exact(points: np.ndarray, a: np.ndarray, b: np.ndarray, *, at_once: int = 8192) -> np.ndarray:
    """Cosines (float64) of the unit vectors points[a[i]] and points[b[i]], the same whatever other pairs are asked for."""
    import numpy as np

    found = [np.einsum("ij,ij->i", *(points[i[s:s + at_once]].astype(np.float64) for i in (a, b))) for s in range(0, len(a), at_once)]
    return np.concatenate(found) if found else np.empty(0)


def greedy(points: np.ndarray, threshold: float, fixed: int = 0, *, block: int = 512) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of (n, d) unit vectors in order of rank: which go, the keeper of each, and their cosine.

    A vector goes if its cosine with one before it that stays is at least `threshold`. Its keeper is the most alike of those before its block of `block`,
    or, if there is none, of those in it; of equals the first. The first `fixed` stay in any case. Each block is compared with those that stay, so that
    many vectors that are alike cost no more than others.
    """
    import numpy as np

    stays = np.arange(min(fixed, len(points)))
    found: list[tuple[int, int, float]] = []
    for start in range(fixed, len(points), block):
        some = np.arange(start, min(start + block, len(points)))
        gone = _best(points, stays, some, threshold)
        rest = np.array([i for i in some.tolist() if i not in gone], np.int64)
        a, b = np.nonzero(np.triu(points[rest] @ points[rest].T >= threshold - ROUNDING, 1))
        likeness = exact(points, rest[a], rest[b])
        near: dict[int, list[tuple[float, int]]] = {}
        for first, second, j in zip(rest[a].tolist(), rest[b].tolist(), likeness.tolist()):
            if j >= threshold:
                near.setdefault(second, []).append((-j, first))
        for i in rest.tolist():
            if of := [e for e in near.get(i, []) if e[1] not in gone]:
                gone[i] = (min(of)[1], -min(of)[0])
        found += [(i, *gone[i]) for i in sorted(gone)]
        stays = np.concatenate([stays, [i for i in rest.tolist() if i not in gone]]).astype(np.int64)
    columns = list(zip(*found)) or [(), (), ()]
    return np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], np.float64)


def _best(points: np.ndarray, stays: np.ndarray, some: np.ndarray, threshold: float, *, at_once: int = 16_384) -> dict[int, tuple[int, float]]:
    """For each of `some` that is near one that stays: the most alike, and their cosine."""
    import numpy as np

    best: dict[int, tuple[int, float]] = {}
    for start in range(0, len(stays), at_once):
        part = stays[start:start + at_once]
        a, b = np.nonzero(points[some] @ points[part].T >= threshold - ROUNDING)
        for row, keeper, j in zip(some[a].tolist(), part[b].tolist(), exact(points, some[a], part[b]).tolist()):
            if j >= threshold and (row not in best or j > best[row][1]):
                best[row] = (keeper, j)
    return best


def clusters(points: np.ndarray, k: int, generator: np.random.Generator, *, each: int = 256) -> np.ndarray:
    """(n,) the nearest of k means, which are found on `each` vectors a cluster, drawn at random. One thread, so that the sums are always the same."""
    import numpy as np
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if k == 1:
        return np.zeros(len(points), np.int64)
    sample = points if len(points) <= each * k else points[np.sort(generator.choice(len(points), each * k, replace=False))]
    with threadpool_limits(limits=1):
        means = KMeans(n_clusters=k, n_init=1, max_iter=50, random_state=int(generator.integers(2**31)), algorithm="lloyd").fit(sample).cluster_centers_
        half = (means**2).sum(1) / 2
        return np.concatenate([(points[s:s + 8192] @ means.T - half).argmax(1) for s in range(0, len(points), 8192)])


class Semantic(Dedup):
    """Drops rows whose embedding is nearly that of a row that stays (as SemDeDup: Abbas et al., 2023, arXiv 2303.09540, section 3).

    The embedding is the model's (mean of the last hidden states), less the mean of all rows unless `centre` is off: what all rows share would make
    the cosine of any two large. Rows are put into clusters by k-means; two rows of one cluster are compared by the cosine of their embeddings,
    two of different clusters are not. With one cluster every pair counts. Unlike SemDeDup, which keeps the row farthest from the cluster's mean, of
    two near rows the one stays that `prefer` says. Rows that the model cannot read are kept.
    """

    uses_model: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "scikit-learn", "numpy")
    reason = "means the same"

    threshold: float = Field(default=0.95, gt=-1, le=1, description="Cosine of two embeddings from which the rows are duplicates.")
    rows_per_cluster: int = Field(default=10_000, ge=1, description="There is a cluster for each so many rows; the cost grows with it.")
    centre: bool = Field(default=True, description="Subtract the mean of all embeddings first.")

    @model_validator(mode="after")
    def _whole(self) -> Semantic:
        if self.part != "all":
            raise ValueError("the embedding is of the whole row; leave `part` out")
        return self

    def duplicates(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np

        with connection(rows, ctx) as con:
            _, fixed = self.rank(rows, ctx, con)
            ranks, points = self._points(rows, ctx, con.sql("select origin, row_id, rank from ranked order by rank").to_arrow_table())
            k = max(1, -(-len(ranks) // self.rows_per_cluster))
            label = clusters(points, k, ctx.generator("clusters")) if len(ranks) else np.empty(0, np.int64)
            order = np.argsort(label, kind="stable")
            found = []
            for members in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
                found.append([ranks[members[i]] for i in greedy(points[members], self.threshold, int((ranks[members] < fixed).sum()))[:2]])
                ctx.progress(len(found), k, "clusters")
            dropped, keepers = (np.concatenate([f[i] for f in found]) for i in (0, 1))
            order = np.argsort(dropped)
            dropped, keepers = dropped[order], keepers[order]
            likeness = exact(points, *(np.searchsorted(ranks, r) for r in (dropped, keepers)))
            size = np.bincount(label, minlength=k)
            ctx.report({"clusters": k, "largest_cluster": int(size.max()), "embedded": len(ranks), "dropped": len(dropped)})
            return self.found(con, dropped, keepers, likeness)

    def _points(self, rows: RowSet, ctx: StepContext, ranked: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Ranks of the rows that have an embedding, ascending, and their vectors (float32, of length 1)."""
        import numpy as np
        import pyarrow.compute as pc

        from ftpipe.models.scores import score_rows

        sources = [(0, rows, TRAIN), *([(1, rows, "heldout")] if self.heldout else []),
                   *((i + 2, RowSet(ctx.inputs[ref]), None) for i, ref in enumerate(self.against))]
        ranks, vectors = [np.empty(0, np.int64)], []
        for origin, source, split in sources:
            scores = score_rows(source, ctx, model=ctx.model, split=split, want=("embedding",))
            scores = scores.filter(scores["embedding"].is_valid())
            these = ranked.filter(pc.equal(ranked["origin"], origin))
            at = pc.index_in(scores["row_id"], value_set=these["row_id"].combine_chunks())
            ranks.append(these["rank"].take(at).to_numpy())
            vectors += [np.stack(scores["embedding"].to_numpy())] if scores.num_rows else []
        if not vectors:
            return ranks[0], np.empty((0, 1), np.float32)
        rank, points = np.concatenate(ranks), np.concatenate(vectors)
        order = np.argsort(rank)
        rank, points = rank[order], points[order]
        if self.centre:
            points = points - points.mean(axis=0, dtype=np.float64).astype(np.float32)
        return rank, points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), np.float32(1e-12))

"""DEFT-UCS: a random seed set, and from clusters of the rest the rows nearest to and farthest from the centroids. No answer is looked at."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.curate.draw import uniforms
from ftpipe.curate.select._clusters import cluster
from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext, connection
from ftpipe.curate.text import row_text
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ftpipe.curate.budget import Limit

UNKNOWN = "no prompt to embed"
SEED, EASY, HARD = "seed", "easy", "hard"


def cosine_distance(points: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(n,) 1 - cos between each of (n, d) points and the mean of its cluster (label: (n,), 0 to k - 1); 1 where either is zero."""
    import numpy as np

    total = np.zeros((int(label.max()) + 1, points.shape[1]))
    np.add.at(total, label, points)
    centre = total[label]  # the sum points where the mean does
    norms = np.linalg.norm(points, axis=1) * np.linalg.norm(centre, axis=1)
    return 1 - np.divide((points * centre).sum(axis=1), norms, out=np.zeros(len(points)), where=norms > 0)


def places(distance: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each point's place in its cluster from the nearest to the centroid (0, 1, ...) and from the farthest, and its cluster's size; (n,) int64 each.
    Equal distances go by order."""
    import numpy as np

    order = np.lexsort((np.arange(len(label)), distance, label))
    size = np.bincount(label)
    starts = np.concatenate([[0], np.cumsum(size)[:-1]])
    near = np.empty(len(label), dtype=np.int64)
    near[order] = np.arange(len(label)) - starts[label[order]]
    return near, size[label] - 1 - near, size[label]


def core_set(near: np.ndarray, far: np.ndarray, size: np.ndarray, amount: int, easy: float) -> tuple[np.ndarray, np.ndarray]:
    """Which points are taken as easy and which as hard, (n,) bool each, if every cluster gives `amount`.

    That is round(easy * amount) of its nearest and the rest of its farthest. A cluster of fewer points gives each once, and a larger `amount` takes what a
    smaller one takes.
    """
    import numpy as np

    nearest = int(np.floor(easy * amount + 0.5))
    is_easy = near < np.minimum(nearest, size)
    return is_easy, (far < amount - nearest) & ~is_easy


class DeftUcs(Selector):
    """Draws a seed set at random (D_base), clusters the other rows by their prompts, and takes equally many from each cluster: easy rows, near the centroid,
    and hard ones, far from it (D_c). Both together fill the budget; the model is to be trained on both.

    Clusters are those of k-means over embeddings of length 1; near and far are by cosine distance to the mean of a cluster. An embedding is the mean of the
    base model's last hidden states over what stands before the row's first answer (the whole of plain text); the paper has Sentence-T5. Answers are not looked
    at, and no random number depends on them. The number taken from each cluster is the largest that fits the budget beside D_base, so a little may be left.
    The paper's best setting is hard rows only; the share of D_base is recalled, not read.
    """

    paper: ClassVar[str] = "DEFT: Data Efficient Fine-Tuning for Large Language Models via Unsupervised Core-Set Selection"
    uses_model: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "scikit-learn", "numpy")
    reason: ClassVar[str] = "neither drawn nor at an end of its cluster"

    clusters: int = Field(default=7, ge=1, description="K: number of clusters; the paper takes one for each kind of task in the data.")
    easy: float = Field(default=0.0, ge=0, le=1, description="alpha: share of what a cluster gives that is nearest to its centroid; the rest is farthest "
                        "from it.")
    base: float = Field(default=0.3, ge=0, lt=1, description="Share of the budget that goes to the seed set.")

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.data.forms import PromptAlone
        from ftpipe.models.scores import score_rows

        limit = self.limit(rows, ctx)
        table = score_rows(rows, ctx, model=ctx.model, want=("embedding",), form=PromptAlone())
        prompts = self._prompts(rows, ctx)
        known = np.array([v is not None for v in table["embedding"].to_pylist()])
        # in an order that answers have no part in; rows of one prompt go by row_id
        order = np.array(sorted(np.flatnonzero(known).tolist(), key=lambda i: prompts[i]), dtype=np.int64)
        # the cost table and the scores are both in ascending order of row_id
        cost = limit.cost["cost"].to_numpy()
        drawn = order[np.argsort(uniforms(pa.array([prompts[i] for i in order], pa.string()), ctx.seed, self.name()), kind="stable")]
        seeds = drawn[limit.take(cost[drawn], int(self.base * limit.amount))]
        rest = order[~np.isin(order, seeds)]
        if len(rest) < self.clusters:
            raise DataError(f"there are {len(rest)} rows beside the seed set, fewer than the {self.clusters} clusters asked for",
                            where=f"{ctx.name} (deft_ucs.clusters)", remedy=f"ask for at most {len(rest)} clusters")
        points = np.stack(table["embedding"].take(pa.array(rest)).to_numpy().tolist()).astype(np.float64)
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        label = cluster(points, self.clusters, int(ctx.generator("cluster").integers(2**31))).label
        distance = cosine_distance(points, label)
        near, far, size = places(distance, label)
        amount = self._amount(near, far, size, cost[rest], limit, int(cost[seeds].sum()))
        easy, hard = core_set(near, far, size, amount, self.easy)
        part = np.full(len(known), None, dtype=object)
        part[seeds], part[rest[easy]], part[rest[hard]] = SEED, EASY, HARD
        if not part.astype(bool).any():
            raise DataError(f"the budget of {limit.amount:,} {limit.unit} holds neither a seed nor a row of each of {len(np.bincount(label))} clusters",
                            where=ctx.name, remedy="ask for more, or for fewer clusters")
        score, of = np.full(len(known), np.nan), np.full(len(known), -1, dtype=np.int32)
        score[rest], of[rest] = distance, label
        column = pa.array(score, pa.float64(), mask=np.isnan(score))
        ctx.annotate(pa.table({"row_id": table["row_id"], "centroid_distance": column, "deft_cluster": pa.array(of, pa.int32(), mask=of < 0),
                               "deft_part": pa.array(part.tolist(), pa.string())}))
        ctx.report({"n": len(known), "seed_rows": len(seeds), "per_cluster": amount, "easy_rows": int(easy.sum()), "hard_rows": int(hard.sum()),
                    "clusters": [{"cluster": i, "size": n, "easy": int(easy[label == i].sum()), "hard": int(hard[label == i].sum())}
                                 for i, n in enumerate(np.bincount(label).tolist())]})
        return pa.table({"row_id": table["row_id"], "times": part.astype(bool).astype(np.int64), "score": column,
                         "reason": pa.array([None if k else UNKNOWN for k in known.tolist()], pa.string())})

    def _amount(self, near: np.ndarray, far: np.ndarray, size: np.ndarray, cost: np.ndarray, limit: Limit, spent: int) -> int:
        """The largest number of rows that each cluster can give within the budget."""
        low, high = 0, int(size.max())
        while low < high:
            middle = (low + high + 1) // 2
            easy, hard = core_set(near, far, size, middle, self.easy)
            low, high = (middle, high) if spent + int(cost[easy | hard].sum()) <= limit.amount else (low, middle - 1)
        return low

    def _prompts(self, rows: RowSet, ctx: StepContext) -> list[str]:
        """A name for each row, in ascending order of row_id, that depends on its prompt alone, and where several rows have one on which of them it is."""
        with connection(rows, ctx) as con:
            texts = con.sql(f"select {row_text('prompt')} as said from rows where split = 'train' order by row_id").to_arrow_table()["said"].to_pylist()
        seen: dict[str, int] = {}
        names = []
        for text in texts:
            name = hashlib.sha256((text or "").encode()).hexdigest()
            seen[name] = seen.get(name, 0) + 1
            names.append(f"{name}~{seen[name]:09d}")
        return names

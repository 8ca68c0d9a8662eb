"""Clustering-based sensitivity sampling: rows drawn in proportion to an upper estimate of their loss, which is queried at cluster centres only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ftpipe.curate.select._clusters import Clustering, cluster, fewest_clusters
from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

UNKNOWN = "no loss: nothing is trained on"


def probabilities(centre_loss: np.ndarray, label: np.ndarray, distance: np.ndarray, *, hoelder: float | np.ndarray = 0.0, z: float = 2.0,
                  floor: float = 0.0) -> np.ndarray:
    """(n,) sampling probabilities that sum to one: p(x) = sigma(x) / sum sigma, with sigma(x) = l(c) + lambda * |x - c|^z for x in the cluster of centre c.

    Args:
        centre_loss: (k,) losses of the centres. label, distance: as in `Clustering`.
        hoelder: the Hoelder constant lambda, one number or one for each cluster (k,).
        floor: no point's probability is below floor / n before the last normalisation: a point of probability 0 would break unbiasedness.
    """
    import numpy as np

    sigma = np.asarray(centre_loss, dtype=np.float64)[label] + np.broadcast_to(hoelder, len(centre_loss))[label] * np.asarray(distance, dtype=np.float64) ** z
    total = sigma.sum()
    p = sigma / total if total > 0 else np.full(len(sigma), 1 / len(sigma))
    p = np.maximum(p, floor / len(p))
    return p / p.sum()


def variance(loss: np.ndarray, p: np.ndarray, draws: int) -> float:
    """Variance of the estimate sum over `draws` draws of l(x) / (draws * p(x)), an unbiased estimate of sum l: (sum l^2 / p - (sum l)^2) / draws."""
    import numpy as np

    loss, p = np.asarray(loss, dtype=np.float64), np.asarray(p, dtype=np.float64)
    # centred form: it has no cancellation and is exactly 0 where p is proportional to the loss
    return float((p * (loss / p - loss.sum()) ** 2).sum() / draws)


def draw(p: np.ndarray, cost: np.ndarray, amount: int, generator: np.random.Generator) -> np.ndarray:
    """Indices drawn i.i.d. from `p` with replacement; the draw whose cost would exceed `amount` ends it (and is not taken), or the amount being met."""
    import numpy as np

    drawn: list[np.ndarray] = []
    spent, cost = 0, np.asarray(cost, dtype=np.int64)
    block = int(min(1 + amount / max(float(p @ cost), 1e-9), 2**20)) + 16
    while spent < amount:
        batch = generator.choice(len(p), size=block, p=p)
        total = spent + np.cumsum(cost[batch])
        fits = int(np.searchsorted(total, amount, side="right"))
        drawn.append(batch[:fits])
        if fits < block:
            break
        spent = int(total[-1])
    return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)


def draws_for(epsilon: float) -> int:
    """Draws for which the estimate is off by at most epsilon (sum l + lambda cost), with constant probability: (2 + 2 epsilon / 3) / epsilon^2, rounded up."""
    return math.ceil((2 + 2 * epsilon / 3) / epsilon ** 2)


def epsilon_of(draws: int) -> float:
    """The error that so many draws promise: the inverse of `draws_for`."""
    return (1 / 3 + math.sqrt(1 / 9 + 2 * draws)) / draws


class SensitivitySampling(Selector):
    """Draws rows in proportion to an upper estimate of their loss, from the losses of k cluster centres alone (Algorithm 1).

    Rows are clustered by embedding (mean of the base model's last hidden states); a cluster's centre is the row nearest to its mean. The loss (mean over the
    answer's tokens, nats) is asked for at the centres only. Row x of the cluster with centre c gets sigma(x) = l(c) + lambda |x - c|^z and is drawn with
    p(x) = sigma(x) / sum sigma, independently and *with replacement*, until the next draw would exceed the budget: a row drawn twice is seen twice. The
    annotation `sampling_weight` is 1 / (s p(x)) for each single draw of s: the sum of weight times loss over the draws estimates the sum over all rows without
    bias (for s fixed beforehand, as with a budget in rows), and that divided by n the mean. Training does not use the weights unless it is told to.

    `tolerance` finds the number of clusters, `epsilon` that of draws. The paper promises an error of epsilon for some 1 / epsilon^2 draws;
    the exact number used here is recalled from its proof, not read.
    """

    paper: ClassVar[str] = "Data-Efficient Learning via Clustering-Based Sensitivity Sampling: Foundation Models and Beyond"
    uses_model: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "scikit-learn", "numpy")
    reason: ClassVar[str] = "not drawn"
    needs_budget: ClassVar[bool] = False

    clusters: int | None = Field(default=64, ge=1, description="k: number of clusters, and of rows whose loss is asked for; not with tolerance.")
    tolerance: float | None = Field(default=None, gt=0, lt=1, description="Take the fewest clusters whose cost, the sum of distance^z, is at most this share "
                                    "of that of a single one.")
    epsilon: float | None = Field(default=None, gt=0, le=1, description="Instead of a budget: draw as often as keeps the error of the estimated sum of losses "
                                  "within this share of it and of lambda times the cost, ceil((2 + 2 epsilon / 3) / epsilon^2).")
    z: float = Field(default=2.0, gt=0, description="Power of the distance; 2 is that of k-means.")
    hoelder: float | None = Field(default=None, ge=0, description="lambda: how fast the loss may change with distance^z. By default (not from the paper) such "
                                  "that the distances weigh as much as the centres' losses in the whole.")
    probes: int = Field(default=0, ge=0, description="Estimate lambda for each cluster from the losses of so many of its rows (the largest "
                        "|l(x) - l(c)| / |x - c|^z), instead of `hoelder`; costs as many further losses.")
    normalize: bool = Field(default=True, description="Scale embeddings to length 1 before clustering.")
    floor: float = Field(default=0.01, ge=0, le=1, description="No row's probability is below about this share of the uniform one.")

    @model_validator(mode="before")
    @classmethod
    def _tolerance_replaces_clusters(cls, values: Any) -> Any:
        return {"clusters": None} | values if isinstance(values, dict) and values.get("tolerance") is not None else values

    @model_validator(mode="after")
    def _one_of_each(self) -> SensitivitySampling:
        if self.probes and self.hoelder is not None:
            raise ValueError("give either hoelder or probes, which estimates it")
        if (self.clusters is None) == (self.tolerance is None):
            raise ValueError("give either clusters, or a tolerance that finds their number")
        if (self.budget is None) == (self.epsilon is None):
            raise ValueError("give either a budget, {tokens: N}, {rows: N}, {share: 0.2} or {like: STAGE}, or an epsilon that finds the number of draws")
        return self

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.models.scores import score_rows

        limit = self.limit(rows, ctx) if self.budget is not None else None
        table = score_rows(rows, ctx, model=ctx.model, want=("embedding",))
        usable = np.flatnonzero(table["trained_tokens"].fill_null(0).to_numpy() > 0)
        if len(usable) < (self.clusters or 1):
            raise DataError(f"there are {len(usable)} rows to sample from, fewer than the {self.clusters or 1} clusters asked for",
                            where=f"{ctx.name} (sensitivity_sampling.clusters)", remedy=f"ask for at most {len(usable)} clusters")
        ids = table["row_id"].take(pa.array(usable))
        points = np.stack(table["embedding"].take(pa.array(usable)).to_numpy().tolist()).astype(np.float64)
        if self.normalize:
            points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        asked: set[int] = set()

        def oracle(indices: np.ndarray) -> np.ndarray:
            """Losses of points; each different point is counted once, whether its loss comes from a forward pass or the cache."""
            asked.update(indices.tolist())
            names = [ids[int(i)].as_py() for i in indices]
            found = score_rows(rows, ctx, model=ctx.model, want=("loss",), only=names)
            loss = dict(zip(found["row_id"].to_pylist(), found["loss"].to_pylist()))
            return np.array([loss[n] for n in names], dtype=np.float64)

        seed = self._seed(ctx)
        found = cluster(points, self.clusters, seed) if self.clusters else fewest_clusters(points, self.tolerance, self.z, seed)
        centre_loss = oracle(found.centre)
        hoelder = self._hoelder(found, centre_loss, oracle, ctx)
        p = probabilities(centre_loss, found.label, found.distance, hoelder=hoelder, z=self.z, floor=self.floor)
        # the cost table and the scores are both in ascending order of row_id
        cost, amount = (limit.cost["cost"].to_numpy()[usable], limit.amount) if limit else (np.ones(len(p)), draws_for(self.epsilon))
        drawn = draw(p, cost, amount, ctx.generator("draw"))
        if not len(drawn):
            raise DataError(f"the budget of {limit.amount:,} {limit.unit} is smaller than the first row drawn", where=ctx.name, remedy="ask for more")
        times = np.bincount(drawn, minlength=len(p))
        self._write(ctx, ids, points, found, centre_loss, hoelder, p, times, len(asked))
        reason = np.full(table.num_rows, UNKNOWN, dtype=object)
        reason[usable] = None
        all_times, score = np.zeros(table.num_rows, dtype=np.int64), np.full(table.num_rows, np.nan)
        all_times[usable], score[usable] = times, p
        return pa.table({"row_id": table["row_id"], "times": all_times, "score": pa.array(score, mask=np.isnan(score)),
                         "reason": pa.array(reason.tolist(), pa.string())})

    def _seed(self, ctx: StepContext) -> int:
        return int(ctx.generator("cluster").integers(2**31))

    def _hoelder(self, found: Clustering, centre_loss: np.ndarray, oracle: Callable[[np.ndarray], np.ndarray], ctx: StepContext) -> np.ndarray:
        """lambda for each cluster, (k,)."""
        import numpy as np

        k, power = len(found.centre), found.distance ** self.z
        if self.hoelder is not None:
            return np.full(k, self.hoelder)
        if not self.probes:
            total = power.sum()
            return np.full(k, centre_loss[found.label].sum() / total if total > 0 else 0.0)
        generator = ctx.generator("probes")
        away = [np.flatnonzero((found.label == i) & (found.distance > 0)) for i in range(k)]
        chosen = [generator.choice(a, size=min(self.probes, len(a)), replace=False) if len(a) else a for a in away]
        loss = np.split(oracle(np.concatenate(chosen).astype(np.int64)), np.cumsum([len(c) for c in chosen])[:-1])
        return np.array([np.max(np.abs(v - centre_loss[i]) / power[c]) if len(c) else 0.0 for i, (c, v) in enumerate(zip(chosen, loss))])

    def _write(self, ctx: StepContext, ids: pa.ChunkedArray, points: np.ndarray, found: Clustering, centre_loss: np.ndarray, hoelder: np.ndarray,
               p: np.ndarray, times: np.ndarray, asked: int) -> None:
        """`clusters.parquet`, `sensitivity.json` and the annotation."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        s, k = int(times.sum()), len(found.centre)
        flat = _project(points)
        pq.write_table(pa.table({"row_id": ids, "cluster": pa.array(found.label, pa.int32()), "x": flat[:, 0], "y": flat[:, 1],
                                 "probability": p, "times": pa.array(times, pa.int32())}), ctx.out / "clusters.parquet", compression="zstd")
        mass, size, drawn = (np.bincount(found.label, weights=w, minlength=k) for w in (p, None, times))
        report: dict[str, Any] = {
            "rows": len(p), "clusters": k, "drawn": s, "distinct": int((times > 0).sum()), "epsilon": epsilon_of(s), "oracle_calls": asked, "z": self.z,
            "lambda": float(hoelder[0]) if np.ptp(hoelder) == 0 else [float(h) for h in hoelder], "cost": float((found.distance ** self.z).sum()),
            "by_cluster": [{"cluster": i, "size": int(size[i]), "centre": ids[int(found.centre[i])].as_py(), "centre_loss": float(centre_loss[i]),
                            "probability": float(mass[i]), "drawn": int(drawn[i])} for i in range(k)]}
        (ctx.out / "sensitivity.json").write_text(json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        ctx.annotate(pa.table({"row_id": ids, "sampling_weight": pa.array(1 / (s * p))}))


def _project(points: np.ndarray) -> np.ndarray:
    """(n, 2): the first two principal components, for the picture. Signs are fixed so that the same points give the same picture."""
    import numpy as np
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    n = min(2, *points.shape)
    with threadpool_limits(limits=1):
        flat = PCA(n_components=n, svd_solver="full" if len(points) <= 5_000 else "covariance_eigh").fit_transform(points)
    flat *= np.where(flat[np.abs(flat).argmax(axis=0), np.arange(n)] < 0, -1.0, 1.0)
    return np.hstack([flat, np.zeros((len(flat), 2 - n))])

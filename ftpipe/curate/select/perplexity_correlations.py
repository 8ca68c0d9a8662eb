"""Perplexity correlations: sources whose losses, over many models, go with those models' errors on a benchmark are taken first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftpipe.curate.draw import uniforms
from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext, connection
from ftpipe.curate.text import row_text
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError, DataError
from ftpipe.stages.base import Environment, Ref

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pyarrow as pa

    from ftpipe.curate.budget import Limit

Estimator = Literal["spearman", "sign_cdf", "sign_sign", "sign", "product"]
UNKNOWN = "the models' losses on its source are not known"
FEWEST = 3
"""Models without which a rank correlation says nothing."""
HELD = 0.05
"""Share of the rows that the classifier is tried on instead of trained."""


def estimate(loss: np.ndarray, error: np.ndarray, estimator: Estimator = "spearman") -> np.ndarray:
    """(D,) how the losses x (N models, D sources) go with the errors y (N,): large where models that predict the source well err little.

    spearman: rank correlation, mean ranks for ties, 0 for a source that all models predict alike. Of the others, all but the last are means over the pairs
    i < j of sign(y_i - y_j) times: CDF(x_i) - CDF(x_j), with the empirical distribution of the column (sign_cdf); sign(x_i - x_j), Kendall's tau a
    (sign_sign); x_i - x_j (sign). product: the mean of x y. The first three do not change if y or a column of x is put through an increasing function.
    """
    import numpy as np
    from scipy.stats import rankdata

    x, y = np.asarray(loss, dtype=np.float64), np.asarray(error, dtype=np.float64)
    if estimator == "product":
        return y @ x / len(y)
    ranks = rankdata(x, axis=0)
    if estimator == "spearman":
        a, b = ranks - ranks.mean(axis=0), rankdata(y) - (len(y) + 1) / 2
        scale = np.sqrt((a ** 2).sum(axis=0) * (b @ b))
        return np.divide(b @ a, scale, out=np.zeros(x.shape[1]), where=scale > 0)
    signs = np.sign(y[:, None] - y[None])
    pairs = len(y) * (len(y) - 1) / 2
    if estimator == "sign_sign":
        return sum(signs[i, i + 1:] @ np.sign(x[i] - x[i + 1:]) for i in range(len(y))) / pairs
    # the sum over i < j of s_ij (v_i - v_j) is the sum over i of v_i times the sum over j of s_ij
    return signs.sum(axis=1) @ (ranks / len(y) if estimator == "sign_cdf" else x) / pairs


def linear_projection(coefficient: np.ndarray, cap: np.ndarray) -> np.ndarray:
    """(D,) weights that sum to 1, none above its cap (D,), with the largest sum of weight times coefficient: the best sources get their caps, the last of them
    what is left. They depend on the ranks of the coefficients only; equal ones are taken in order. Raises ValueError for caps that cannot hold 1."""
    import numpy as np

    cap = _holds_one(cap)
    order = np.argsort(-np.asarray(coefficient), kind="stable")
    before = np.concatenate([[0.0], np.cumsum(cap[order])[:-1]])
    weights = np.zeros(len(cap))
    weights[order] = np.clip(1 - before, 0, cap[order])
    return weights


def l2_projection(coefficient: np.ndarray, cap: np.ndarray) -> np.ndarray:
    """(D,) the weights nearest to the coefficients that sum to 1 and lie between 0 and the caps: clip(coefficient + c, 0, cap), c found by bisection."""
    import numpy as np

    coefficient, cap = np.asarray(coefficient, dtype=np.float64), _holds_one(cap)
    low, high = -coefficient.max(), float((cap - coefficient).max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(coefficient + middle, 0, cap).sum() < 1 else (low, middle)
    return np.clip(coefficient + high, 0, cap)


def _holds_one(cap: np.ndarray) -> np.ndarray:
    import numpy as np

    cap = np.asarray(cap, dtype=np.float64)
    if (cap <= 0).any():
        raise ValueError("a cap must be above 0")
    if cap.sum() < 1 - 1e-9:
        raise ValueError(f"the caps sum to {cap.sum():.6g}, and the weights must sum to 1")
    return cap


class Witness(BaseModel):
    """One model: what it loses on rows of each source, and how it does on the benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    losses: Ref = Field(description="Stage after a `loss` step under this model, over rows of the same sources (a sample will do).")
    evaluation: Ref | None = Field(default=None, description="Evaluate stage that measured this model.")
    error: float | None = Field(default=None, description="Its error on the benchmark (1 - accuracy, or a loss), instead of an evaluation.")

    @model_validator(mode="after")
    def _one(self) -> Witness:
        if (self.evaluation is None) == (self.error is None):
            raise ValueError("give either the evaluation or the error of each model")
        return self


class PerplexityCorrelations(Selector):
    """Estimates for each source how losses on it go with errors on a benchmark, over models that are there already, and fills the budget from the best.

    The matrix of losses, in bits a byte of the text that is predicted, has a row for each model and a column for each source; the models' errors are averaged
    over the suites. Models that lack a number are left out. The coefficient of a source is a rank correlation by default: positive where models that predict it
    well err little. A source's weight is capped so that no row is repeated: size / budget. By the linear projection the best sources are taken whole, until the
    budget is met; rows inside a source are drawn at random. With `rank: classifier` rows of the sources with a weight are told from the others by a linear
    classifier on words and pairs of words, and all rows are ranked by it, as the paper does with fastText; here it is scikit-learn's logistic regression.
    The paper used 90 models; a handful can only point.
    """

    paper: ClassVar[str] = "Improving Pretraining Data Using Perplexity Correlations"
    uses_seed: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "scipy", "scikit-learn")

    models: dict[str, Witness] = Field(default={}, description="The models by name: {small: {losses: STAGE, evaluation: STAGE}, ...}.")
    table: str = Field(default="", description="File of the models instead (CSV, JSON lines or Parquet): columns model, error, and the loss on each source "
                       "under the source's name; relative to the configuration.")
    by: Literal["source", "group"] = Field(default="source", description="What a source is.")
    suites: list[str] = Field(default=["heldout_loss"], min_length=1, description="Suites of the evaluations; a model's error is the mean over them.")
    system: str = Field(default="adapter", description="System in the evaluations that is the model.")
    estimator: Estimator = Field(default="spearman", description="How losses and errors are compared.")
    projection: Literal["linear", "l2"] = Field(default="linear", description="How coefficients become weights; only the first depends on their ranks alone.")
    rank: Literal["sources", "classifier"] = Field(default="sources", description="Draw rows of the chosen sources, or rank all rows by how much they read "
                                                   "like them.")

    @model_validator(mode="after")
    def _one_evidence(self) -> PerplexityCorrelations:
        if bool(self.models) == bool(self.table):
            raise ValueError("give either models or a table of them")
        if self.models and len(self.models) < FEWEST:
            raise ValueError(f"{len(self.models)} models have no rank correlation worth the name: give {FEWEST} at least, and many more if you can")
        return self

    def externals(self, env: Environment) -> dict[str, Any]:
        if not self.table:
            return {}
        from ftpipe.canonical import file_digest

        return {"table": file_digest(self._file(env))}

    def _file(self, env: Environment) -> Path:
        path = env.path(self.table)
        if not path.is_file() or path.suffix not in (".csv", ".jsonl", ".parquet"):
            raise ConfigError(f"{path} is no CSV, JSON lines or Parquet file", where=f"{self.name()}.table",
                              remedy="name a file that is there, .csv, .jsonl or .parquet")
        return path

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        limit = self.limit(rows, ctx)
        table = rows.table(columns=["row_id", self.by]).sort_by("row_id")
        of_row, cost = np.array(table[self.by].to_pylist(), dtype=object), limit.cost["cost"].to_numpy()
        found = self._losses(sorted(set(of_row)), ctx)
        names = sorted(found["loss"])
        at = {n: i for i, n in enumerate(names)}
        index = np.array([at.get(s, -1) for s in of_row])
        size = np.bincount(index[index >= 0], weights=cost[index >= 0], minlength=len(names))
        if size.sum() < limit.amount:
            raise DataError(f"the budget is {limit.amount:,} {limit.unit}, and the sources that the models know hold {int(size.sum()):,}", where=ctx.name,
                            remedy="ask for less, or give the models' losses on more sources")
        coefficient = estimate(np.column_stack([found["loss"][n] for n in names]), found["error"], self.estimator)
        project = linear_projection if self.projection == "linear" else l2_projection
        weight = np.zeros(len(names))
        weight[size > 0] = project(coefficient[size > 0], size[size > 0] / limit.amount)
        score = np.where(index >= 0, coefficient[index], np.nan)
        extra: dict[str, Any] = {}
        if self.rank == "sources":
            taken = self._draw(table["row_id"], index, weight, coefficient, cost, limit, ctx)
        else:
            taken, score, extra = self._classified(rows, ctx, index, weight, cost, limit)
        times = np.zeros(len(index), dtype=np.int64)
        times[taken] = 1
        known, inside = ~np.isnan(score), taken[index[taken] >= 0]
        chosen = np.bincount(index[inside], weights=cost[inside], minlength=len(names))
        ctx.annotate(pa.table({"row_id": table["row_id"], "perplexity_correlation": pa.array(score, pa.float64(), mask=~known)}))
        ctx.report({"models": found["models"], "left_out": found["left_out"], "estimator": self.estimator, "projection": self.projection, "chosen": len(taken),
                    "sources": [{"source": n, "coefficient": float(coefficient[i]), "weight": float(weight[i]), "holds": int(size[i]),
                                 "chosen": int(chosen[i])} for i, n in enumerate(names)]} | extra)
        return pa.table({"row_id": table["row_id"], "times": times, "score": pa.array(score, pa.float64(), mask=~known),
                         "reason": pa.array([None if ok else UNKNOWN for ok in known.tolist()], pa.string())})

    def _losses(self, sources: list[str], ctx: StepContext) -> dict[str, Any]:
        """The evidence on those of `sources` that any model knows: `loss` by source (models,), `error` (models,), names of the models used and left out."""
        import numpy as np

        lines = self._from_table(ctx) if self.table else self._from_stages(ctx)
        known = sorted({s for _, _, losses in lines for s in losses} & set(sources))
        if not known:
            raise DataError(f"the models' losses are on none of the sources here, {', '.join(sources[:10])}", where=f"{ctx.name} ({self.name()})",
                            remedy="give losses under the names that `by` gives the sources")
        whole = [m for m in lines if all(math.isfinite(v) for v in (m[1], *(m[2].get(s, math.nan) for s in known)))]
        if len(whole) < FEWEST:
            raise DataError(f"{len(whole)} of {len(lines)} models have an error and a loss on each of {len(known)} sources, and {FEWEST} are needed",
                            where=f"{ctx.name} ({self.name()})", remedy="add models, or what is missing of those there are")
        used = [m[0] for m in whole]
        return {"loss": {s: np.array([m[2][s] for m in whole]) for s in known}, "error": np.array([m[1] for m in whole]), "models": used,
                "left_out": [m[0] for m in lines if m[0] not in used]}

    def _from_stages(self, ctx: StepContext) -> list[tuple[str, float, dict[str, float]]]:
        """Each model, its error and its bits a byte by source."""
        from ftpipe.curate.select._evaluations import mean_score

        found = []
        for name, witness in sorted(self.models.items()):
            where = f"{ctx.name} ({self.name()}.models.{name})"
            error = witness.error
            if error is None:
                measured = [mean_score(ctx.inputs[witness.evaluation], suite, "", self.system, where) for suite in self.suites]
                error = sum(1 - v if higher else v for v, higher in measured) / len(measured)
            scored = RowSet(ctx.inputs[witness.losses])
            nll = scored.annotation("nll")
            if nll is None:
                raise DataError(f"{witness.losses} has no losses", where=where, remedy="name a `loss` step, or a stage after one")
            with connection(scored, ctx) as con:
                con.register("scored", nll)
                lines = con.sql(f"""select s, sum(nll) / (ln(2) * sum(bytes)) from (select "{self.by}" as s, nll, strlen({row_text('answer')}) as bytes
                                    from rows join scored using (row_id) where split = 'train' and nll is not null)
                                    group by s having sum(bytes) > 0""").fetchall()
            found.append((name, float(error), dict(lines)))
        return found

    def _from_table(self, ctx: StepContext) -> list[tuple[str, float, dict[str, float]]]:
        """The same from a file. A loss that is not there is NaN."""
        import pyarrow.parquet as pq
        from pyarrow import csv, json

        path = self._file(ctx.env)
        table = {".csv": csv.read_csv, ".jsonl": json.read_json, ".parquet": pq.read_table}[path.suffix](path)
        lines = table.to_pylist()
        try:
            if not {"model", "error"} <= set(table.column_names):
                raise ValueError("it has no columns model and error")
            found = [(str(line.pop("model")), _number(line.pop("error")), {s: _number(v) for s, v in line.items()}) for line in lines]
            if len({m for m, _, _ in found}) < len(found):
                raise ValueError("it names a model twice")
        except (TypeError, ValueError) as error:
            raise DataError(f"the table of models cannot be used: {error}", where=str(path),
                            remedy="columns: model, error, and one of losses for each source") from error
        return sorted(found)

    def _draw(self, ids: pa.ChunkedArray, index: np.ndarray, weight: np.ndarray, coefficient: np.ndarray, cost: np.ndarray, limit: Limit,
              ctx: StepContext) -> np.ndarray:
        """Rows drawn inside each source up to its weight, the best source first; what no row of a source fits in is offered to the next."""
        import numpy as np

        order = np.lexsort((np.arange(len(index)), uniforms(ids, ctx.seed, self.name())))
        taken, over = [np.zeros(0, dtype=np.int64)], 0.0
        for i in np.argsort(-coefficient, kind="stable"):
            if weight[i] > 0:
                these = order[index[order] == i]
                wanted = weight[i] * limit.amount + over
                got = these[limit.take(cost[these], int(wanted + 1e-6))]
                over = wanted - float(cost[got].sum())
                taken.append(got)
        return np.concatenate(taken)

    def _classified(self, rows: RowSet, ctx: StepContext, index: np.ndarray, weight: np.ndarray, cost: np.ndarray,
                    limit: Limit) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Rows by how much they read like those of the sources with a weight: which are taken, each row's probability, and numbers for the report."""
        import numpy as np
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits

        with connection(rows, ctx) as con:
            lines = con.sql(f"select row_id, {row_text()} as said from rows where split = 'train' order by row_id").to_arrow_table()
        include = np.where(index >= 0, weight[index] > 0, False)
        held = (uniforms(lines["row_id"], ctx.seed, self.name(), "held") < HELD) & (index >= 0)
        train = (index >= 0) & ~held
        if len(set(include[train])) < 2:
            raise DataError("all sources have a weight, so there is nothing to tell them from", where=f"{ctx.name} ({self.name()}.rank)",
                            remedy="lower the budget, or use `rank: sources`")
        features = HashingVectorizer(ngram_range=(1, 2), n_features=2**20, alternate_sign=False).transform(lines["said"].to_pylist())
        with threadpool_limits(limits=1):
            model = LogisticRegression(C=10.0, max_iter=1000).fit(features[train], include[train])
            score = model.predict_proba(features)[:, 1]
        order = np.argsort(-score, kind="stable")
        right = (score > 0.5) == include
        return order[limit.take(cost[order])], score, {"classifier": {"trained_on": int(train.sum()), "held_out": int(held.sum()),
                                                                      "right": float(right[held].mean()) if held.any() else None}}


def _number(value: Any) -> float:
    return math.nan if value is None or value == "" else float(value)

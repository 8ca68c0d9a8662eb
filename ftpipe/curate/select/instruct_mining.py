"""InstructMining: a linear rule from indicators to the loss that a model tuned on the rows would have; the rows of lowest predicted loss are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

CONSTANT = "intercept"
RULES = {
    "first": {CONSTANT: 1.0694, "reward": -0.1498, "output_length": 8.257e-5, "knn_6": -0.9350},
    "later": {CONSTANT: 0.0274, "reward": -0.0078, "understandability": 0.4421, "naturalness": -0.3212, "coherence": -0.1520},
}
"""Coefficients of log loss that the first and the later version of the paper print. In the later one understandability raises the loss."""
UNKNOWN = "an indicator of the row is not known"


@dataclass(frozen=True)
class Fit:
    """A rule found by least squares. coefficients, errors (standard errors), p_values: by name, `intercept` among them. r2: share of the variance explained.
    dropped: indicators left out, and why."""

    coefficients: dict[str, float]
    errors: dict[str, float]
    p_values: dict[str, float]
    r2: float
    dropped: dict[str, str]


def least_squares(means: dict[str, np.ndarray], log_loss: np.ndarray, significance: float = 1.0) -> Fit:
    """Ordinary least squares of log losses (m,) of m runs on the means (m,) of indicators over the rows of each, with an intercept.

    Indicators that do not vary are left out, then one after the other the least significant one, until none has a p-value (t-test, m - coefficients degrees
    of freedom) above `significance`. Raises DataError for fewer runs than coefficients and one more, or indicators that determine each other.
    """
    import numpy as np
    from scipy.stats import t

    y, dropped = np.asarray(log_loss, dtype=np.float64), {}
    names = []
    for name, values in means.items():
        spread = np.ptp(values)
        if spread <= 1e-9 * max(np.abs(values).max(), 1e-300):
            dropped[name] = "the same in every run"
        else:
            names.append(name)
    while True:
        scale = np.array([1.0, *(np.ptp(means[n]) for n in names)])
        x = np.column_stack([np.ones(len(y)), *(means[n] for n in names)]) / scale
        free = len(y) - x.shape[1]
        if free < 1:
            raise DataError(f"{len(y)} runs cannot tell {x.shape[1]} coefficients apart", where="instruct_mining.runs",
                            remedy="add runs or use fewer indicators")
        if np.linalg.matrix_rank(x) < x.shape[1]:
            raise DataError(f"over the runs the indicators {names} determine each other", where="instruct_mining.runs", remedy="use fewer indicators")
        beta = np.linalg.lstsq(x, y, rcond=None)[0]
        residual = y - x @ beta
        covariance = np.linalg.inv(x.T @ x) * (residual @ residual) / free
        error = np.sqrt(np.diag(covariance))
        with np.errstate(divide="ignore", invalid="ignore"):
            p = 2 * t.sf(np.abs(np.where(error > 0, beta / error, np.where(beta == 0, 0.0, np.inf))), free)
        worst = int(np.argmax(p[1:])) + 1 if names else 0
        if not names or p[worst] <= significance:
            break
        dropped[names.pop(worst - 1)] = f"not significant (p = {p[worst]:.3g})"
    total = ((y - y.mean()) ** 2).sum()
    keys = [CONSTANT, *names]
    return Fit(dict(zip(keys, (beta / scale).tolist())), dict(zip(keys, (error / scale).tolist())), dict(zip(keys, p.tolist())),
               float(1 - residual @ residual / total) if total > 0 else 0.0, dropped)


def predicted(coefficients: dict[str, float], values: dict[str, np.ndarray]) -> np.ndarray:
    """Log losses that a rule predicts from indicators (n,): the intercept and the sum of coefficient times indicator."""
    return coefficients.get(CONSTANT, 0.0) + sum(c * values[n] for n, c in coefficients.items() if n != CONSTANT)


class Experiment(BaseModel):
    """A model tuned on some of the rows, and how it did: two stages of the pipeline."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: Ref = Field(description="Stage whose train rows it was tuned on; they must be among the rows of this step.")
    evaluation: Ref = Field(description="Evaluate stage that measured its loss.")


class InstructMining(Selector):
    """Predicts for each row the log of the loss of a model tuned on rows like it, log L = b0 + sum b_i I_i, and keeps the lowest.

    The paper fits the rule to runs: subsets of rows, a model tuned on each, log loss on fixed good data regressed on the subset's mean indicators (ordinary
    least squares, significant terms kept), then applied row by row. `runs` does that with stages of this pipeline. The published rules are there too, `first`
    (reward, output length, distance to the 6th neighbour) and `later` (reward, understandability, naturalness, coherence); they belong to the paper's reward
    model, judges and embeddings, which are not part of ftpipe: annotate their scores by a step of your own. On other scales they order rows otherwise, so
    fitting anew is the better way. `coefficients` writes a rule out.

    Indicators: input_length and output_length (tokens), perplexity, mtld (lexical diversity of the answer), knn_i (distance to the i-th nearest row between
    embeddings), and any column that a step before this one annotates. The search for the best number of rows (BlendSearch) of the later version is not here.
    """

    paper: ClassVar[str] = "Instruction Mining: High-Quality Instruction Data Selection for Large Language Models"
    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "scikit-learn", "scipy", "numpy")
    reason: ClassVar[str] = "higher predicted loss than those kept"

    rule: Literal["first", "later"] | None = Field(default=None, description="The rule of the paper's first or later version.")
    coefficients: dict[str, float] | None = Field(default=None, description="A rule of your own: {intercept: 1.0, knn_6: -0.9}.")
    runs: list[Experiment] = Field(default=[], description="Fit the rule to these: {rows: STAGE, evaluation: STAGE} each.")
    indicators: list[str] = Field(default=["output_length", "perplexity", "mtld", "knn_6"], min_length=1, description="Indicators that the rule is fitted to.")
    significance: float = Field(default=0.05, gt=0, le=1, description="Largest p-value of a term of the fitted rule; 1 keeps all.")
    suite: str = Field(default="heldout_loss", description="Suite of the evaluations that measured the loss.")
    metric: str = Field(default="", description="Metric of the suite, a loss; may be left out where it has only one.")
    system: str = Field(default="adapter", description="System in the evaluations that was tuned on the rows.")

    @model_validator(mode="after")
    def _one_rule(self) -> InstructMining:
        given = [n for n in ("rule", "coefficients", "runs") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(f"give one of rule, coefficients and runs, not {' and '.join(given) or 'none'}")
        if self.coefficients and not set(self.coefficients) - {CONSTANT}:
            raise ValueError("the rule has no indicator")
        return self

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.curate.select._indicators import indicators

        limit = self.limit(rows, ctx)
        rule = RULES[self.rule] if self.rule else self.coefficients
        ids, values = indicators(list(dict.fromkeys(self.indicators if rule is None else (n for n in rule if n != CONSTANT))), rows, ctx)
        fit = None
        if rule is None:
            fit = least_squares(*self._evidence(ids, values, ctx), self.significance)
            rule = fit.coefficients
            if set(rule) == {CONSTANT}:
                raise DataError(f"none of the indicators tells the runs apart: {fit.dropped}", where=f"{ctx.name} (instruct_mining.runs)",
                                remedy="add runs, use other indicators, or raise significance")
        score = np.broadcast_to(predicted(rule, values), len(ids)).astype(np.float64)
        known = np.isfinite(score)
        order = np.flatnonzero(known)
        order = order[np.argsort(score[order], kind="stable")]
        # the cost table and the indicators are both in ascending order of row_id
        taken = limit.first(order)
        times = np.zeros(len(score), dtype=np.int64)
        times[taken] = 1
        column = pa.array(score, pa.float64(), mask=~known)
        ctx.annotate(pa.table({"row_id": ids, "predicted_log_loss": column, **{n: pa.array(v, pa.float64(), mask=np.isnan(v)) for n, v in values.items()}}))
        ctx.report({"n": len(score), "scored": int(known.sum()), "chosen": len(taken), "rule": self.rule or ("given" if fit is None else "fitted"),
                    "coefficients": rule, "highest_chosen": float(score[taken].max()) if len(taken) else None} | self._found(fit))
        return pa.table({"row_id": ids, "times": times, "score": column, "reason": pa.array([None if ok else UNKNOWN for ok in known.tolist()], pa.string())})

    def _evidence(self, ids: pa.ChunkedArray, values: dict[str, np.ndarray], ctx: StepContext) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Mean of each indicator over the rows of each run, repetitions counted, and the log losses, (runs,) each."""
        import numpy as np
        import pyarrow.compute as pc

        from ftpipe.curate.select._evaluations import mean_score

        means: dict[str, list[float]] = {n: [] for n in values}
        losses = []
        for run in self.runs:
            where = f"{ctx.name} (instruct_mining.runs)"
            loss, higher = mean_score(ctx.inputs[run.evaluation], self.suite, self.metric, self.system, where)
            if higher or not loss > 0:
                raise DataError(f"{run.evaluation} measured {loss:.4g} by {self.suite}, which is no loss", where=where,
                                remedy="name a suite whose score is a loss")
            losses.append(loss)
            table = RowSet(ctx.inputs[run.rows]).table(columns=["row_id", "times"])
            at = pc.index_in(table["row_id"], value_set=ids.combine_chunks())
            if at.null_count:
                raise DataError(f"{at.null_count} rows of {run.rows} are not among those of this step", where=where, remedy="draw the subsets from these rows")
            at, times = at.to_numpy(), table["times"].to_numpy()
            for name, value in values.items():
                known = ~np.isnan(value[at])
                if not known.any():
                    raise DataError(f"{name} is not known of any row of {run.rows}", where=where, remedy="leave it out of `indicators`")
                means[name].append(float(np.average(value[at][known], weights=times[known])))
        return {n: np.array(v) for n, v in means.items()}, np.log(losses)

    def _found(self, fit: Fit | None) -> dict[str, Any]:
        return {} if fit is None else {"runs": len(self.runs), "r2": fit.r2, "standard_errors": fit.errors, "p_values": fit.p_values, "dropped": fit.dropped}

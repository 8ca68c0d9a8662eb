"""Perplexity filter: keep the rows that surprise the base model least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ftpipe.curate.filter.base import Filter
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Perplexity(Filter):
    """Keeps the `keep` share of rows with the lowest perplexity, or those between two bounds.

    The perplexity is exp(mean negative log-likelihood of the answer's tokens), *conditional* on the conversation before the answer (on nothing, for plain
    text), the loss in float32. It keeps exactly int(keep * n) of the n train rows, ties in order of row_id, as the paper's code does (section 3.2; there the
    condition is an image and a prompt). The paper finds that what surprises most is obscure facts, serial and version numbers rather than gibberish: this is
    not a filter of quality alone. Rows without an answer's token have no perplexity and are dropped.
    """

    paper: ClassVar[str] = "POINTS: Improving Your Vision-language Model with Affordable Strategies"
    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    keep: float | None = Field(default=0.2, gt=0, le=1, description="Share of the rows to keep, those of lowest perplexity; not with min or max.")
    min: float | None = Field(default=None, ge=1, description="Drop rows of lower perplexity (1 is certainty).")
    max: float | None = Field(default=None, ge=1, description="Drop rows of higher perplexity.")

    @model_validator(mode="before")
    @classmethod
    def _bounds_replace_share(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("min") is not None or values.get("max") is not None):
            values = {"keep": None} | values
        return values

    @model_validator(mode="after")
    def _one_way(self) -> Perplexity:
        bounds = self.min is not None or self.max is not None
        if bounds == (self.keep is not None):
            raise ValueError("give either keep (a share) or min and max (bounds)")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self

    def judge(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.models.scores import score_rows

        table = score_rows(rows, ctx, model=ctx.model, want=("loss",))
        perplexity = np.exp(table["loss"].to_numpy())  # null becomes NaN
        known = ~np.isnan(perplexity)
        reason = np.full(len(perplexity), None, dtype=object)
        if self.keep is not None:
            order = np.argsort(perplexity, kind="stable")  # NaN comes last; equal ones stay in order of row_id
            dropped = np.ones(len(perplexity), dtype=bool)
            dropped[order[: int(self.keep * len(perplexity))]] = False
            reason[dropped] = "perplexity too high"
        else:
            reason[perplexity < (self.min or 0)] = "perplexity too low"
            reason[perplexity > (self.max or np.inf)] = "perplexity too high"
        reason[~known] = "no perplexity: nothing is trained on"
        score = pa.array(perplexity, pa.float64(), mask=~known)
        ctx.annotate(pa.table({"row_id": table["row_id"], "perplexity": score, "loss": table["loss"]}))
        kept = np.equal(reason, None)
        ctx.report({"n": len(kept), "kept": int(kept.sum()), "given": "the conversation before the answer",
                    "quantiles": {f"{q:g}": float(np.quantile(perplexity[known], q)) for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)} if known.any() else {},
                    "highest_kept": float(perplexity[kept].max()) if kept.any() else None})
        return pa.table({"row_id": table["row_id"], "kept": pa.array(kept), "score": score, "reason": pa.array(reason.tolist(), pa.string())})

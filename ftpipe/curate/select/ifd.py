"""Instruction-following difficulty: keep the rows whose prompt helps the model least to say the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ZERO = "the answer alone has no loss"
CUT = "longer than the model's context: the losses are of different tokens"
BEYOND = "the prompt does not help"


class Ifd(Selector):
    """Ranks rows by L(answer | prompt) / L(answer alone), mean losses of the same tokens, and takes from the top until the budget is full.

    The ratio is that of Li et al. (2024), "From Quantity to Quality", a yardstick of the field. 0 means that the prompt says everything about the answer, 1
    that it says nothing. What lies at `below` or above is left out before the ranking: an answer that its prompt makes no likelier may not belong to it.

    The answer alone is the answer's tokens of training, its end of turn with them, behind BOS (`AnswerAlone`); the prompt is everything before them. Of several
    answers in a conversation the first sees nothing and a later one the answers before it. A row that the context cuts, a row of plain text, and one that
    cannot be rendered have no ratio and are left out. Ties go by row_id. Li et al. score with a model trained
    briefly on a few of the rows, so that it follows prompts at all; name such a model in the curate stage's `model` where the base does not.
    """

    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    reason: ClassVar[str] = "easier than those kept"

    below: float | None = Field(default=1.0, gt=0, description="Leave out rows whose ratio is this or more; null keeps them in the ranking.")

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.data.forms import AnswerAlone
        from ftpipe.models.scores import score_rows

        limit = self.limit(rows, ctx)
        given = score_rows(rows, ctx, model=ctx.model, want=("loss",))
        alone = score_rows(rows, ctx, model=ctx.model, want=("loss",), form=AnswerAlone())
        ratio, reason = difficulty(given, alone)
        if self.below is not None:
            reason[np.equal(reason, None) & (ratio >= self.below)] = BEYOND
        open_to = np.flatnonzero(np.equal(reason, None))
        order = open_to[np.argsort(-ratio[open_to], kind="stable")]
        # the cost table and the scores are both in ascending order of row_id
        taken = limit.first(order)
        times = np.zeros(len(ratio), dtype=np.int64)
        times[taken] = 1
        score = pa.array(ratio, pa.float64(), mask=np.isnan(ratio))
        ctx.annotate(pa.table({"row_id": given["row_id"], "ifd": score, "loss_given_prompt": given["loss"], "loss_alone": alone["loss"]}))
        ctx.report(self._summary(ratio, taken))
        return pa.table({"row_id": given["row_id"], "times": times, "score": score, "reason": pa.array(reason.tolist(), pa.string())})

    def _summary(self, ratio: np.ndarray, taken: np.ndarray) -> dict[str, Any]:
        import numpy as np

        known = ratio[~np.isnan(ratio)]
        return {"n": len(ratio), "scored": len(known), "chosen": len(taken), "lowest_chosen": float(ratio[taken].min()) if len(taken) else None,
                "at_or_above": int((known >= self.below).sum()) if self.below is not None else None,
                "quantiles": {f"{q:g}": float(np.quantile(known, q)) for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)} if len(known) else {}}


def difficulty(given: pa.Table, alone: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(n,) ratios of two tables of `score_rows`, NaN where there is none, and (n,) why: text, None where there is a ratio."""
    import numpy as np

    with_prompt, without = given["loss"].to_numpy(), alone["loss"].to_numpy()
    reason = np.array([g or a for g, a in zip(given["problem"].to_pylist(), alone["problem"].to_pylist())], dtype=object)
    reason[np.equal(reason, None) & (np.isnan(with_prompt) | np.isnan(without))] = "no loss: nothing is trained on"
    reason[np.equal(reason, None) & (given["trained_tokens"].to_numpy() != alone["trained_tokens"].to_numpy())] = CUT
    reason[np.equal(reason, None) & (without == 0)] = ZERO
    known = np.equal(reason, None)
    return np.divide(with_prompt, without, out=np.full(len(reason), np.nan), where=known), reason

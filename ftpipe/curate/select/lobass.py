"""LoBaSS: keep the rows a reference model learned most of."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

UNKNOWN = "no loss: nothing is trained on"
ZERO = "base loss is zero: nothing to learn"
FLOOR = "base loss below the floor"


def learnability(base: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """1 - L_ref / L_base for losses of shape (n,), sums or means alike (the token count cancels); NaN where the base loss is zero or unknown."""
    import numpy as np

    base, reference = np.asarray(base, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    return 1.0 - np.divide(reference, base, out=np.full(base.shape, np.nan), where=base > 0)


class Lobass(Selector):
    """Ranks rows by learnability, 1 - L_ref / L_base on the answer's tokens given the prompt, and takes from the top until the budget is full.

    L_base is the loss of the base model, L_ref that of a reference: the base fine-tuned on the whole pool (or a sample of it) by the train stage that
    `reference` names. The model trained on the selection starts from the base again, not from the reference. A reference that has seen the rows for several
    epochs has memorised noise, which then looks learnable: one short epoch is enough.

    The single ranking decides, as in the paper. It does not reject what the model knows already: a loss falling from 0.10 to 0.01 scores 0.9. `floor` does; the
    paper has no such bound. Ties go by row_id.
    """

    paper: ClassVar[str] = "LoBaSS: Gauging Learnability in Supervised Fine-tuning Data"
    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "peft")
    reason: ClassVar[str] = "less learnable than those kept"

    reference: Ref = Field(description="Train stage whose adapter makes the base model the reference model.")
    floor: float | None = Field(default=None, ge=0, description="Leave out rows whose base loss (nats a token) is below this: known already. Not in the paper.")

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.models.scores import score_rows

        reference = ctx.inputs[self.reference]
        if not reference.has("adapter"):
            raise ConfigError(f"reference: {self.reference} is a {reference.kind} stage, which makes no adapter", where=ctx.name,
                              remedy="name a train stage")
        limit = self.limit(rows, ctx)
        before = score_rows(rows, ctx, model=ctx.model, want=("loss",))
        after = score_rows(rows, ctx, model=ctx.model, want=("loss",), adapter=reference)
        score = learnability(before["nll"].to_numpy(), after["nll"].to_numpy())
        base = before["loss"].to_numpy()
        reason = np.full(len(score), None, dtype=object)
        reason[base < (self.floor or 0)] = FLOOR
        reason[base == 0] = ZERO
        reason[np.isnan(base)] = UNKNOWN
        open_to = np.flatnonzero(np.equal(reason, None))
        order = open_to[np.argsort(-score[open_to], kind="stable")]
        # the cost table and the scores are both in ascending order of row_id
        taken = order[limit.take(limit.cost["cost"].to_numpy()[order])]
        times = np.zeros(len(score), dtype=np.int64)
        times[taken] = 1
        column = pa.array(score, pa.float64(), mask=np.isnan(score))
        ctx.annotate(pa.table({"row_id": before["row_id"], "learnability": column, "loss_base": before["loss"], "loss_reference": after["loss"]}))
        ctx.report(self._summary(before, after, score, taken))
        return pa.table({"row_id": before["row_id"], "times": times, "score": column, "reason": pa.array(reason.tolist(), pa.string())})

    def _summary(self, before: pa.Table, after: pa.Table, score: np.ndarray, taken: np.ndarray) -> dict[str, object]:
        """What the report shows: how many improved, and how far the score follows the length, against the plain difference (RHO-LM)."""
        import numpy as np
        from scipy.stats import spearmanr

        known = ~np.isnan(score)
        base, reference = before["nll"].to_numpy()[known], after["nll"].to_numpy()[known]
        length = before["trained_tokens"].to_numpy()[known]

        def follows(values: np.ndarray) -> float | None:
            varied = known.sum() > 2 and np.ptp(values) > 0 and np.ptp(length) > 0
            return float(spearmanr(values, length).statistic) if varied else None

        return {"n": len(score), "scored": int(known.sum()), "improved": int((score[known] > 0).sum()), "chosen": len(taken),
                "lowest_chosen": float(score[taken].min()) if len(taken) else None, "reference": self.reference,
                "loss_base": float(base.sum() / max(length.sum(), 1)), "loss_reference": float(reference.sum() / max(length.sum(), 1)),
                "spearman_length": {"score": follows(score[known]), "difference": follows(base - reference)}}

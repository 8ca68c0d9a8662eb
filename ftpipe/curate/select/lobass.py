"""LoBaSS: keep the rows a reference model learned most of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError
from ftpipe.stages.base import Environment, Ref

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ftpipe.artifacts import Artifact

UNKNOWN = "no loss: nothing is trained on"
UNKNOWN_THERE = "no loss under the reference model"
ZERO = "base loss is zero: nothing to learn"
FLOOR = "base loss below the floor"


def learnability(base: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """1 - L_ref / L_base for losses of shape (n,), sums or means alike (the token count cancels); NaN where the base loss is zero or unknown."""
    import numpy as np

    base, reference = np.asarray(base, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    return 1.0 - np.divide(reference, base, out=np.full(base.shape, np.nan), where=base > 0)


class Lobass(Selector):
    """Ranks rows by learnability, 1 - L_ref / L_base on the answer's tokens given the prompt, and takes from the top until the budget is full.

    L_base is the loss of the base model, L_ref that of a reference. In the paper that is the base fine-tuned on the whole pool: the train stage that
    `reference` names, or one that ended earlier (a checkpoint), or a stage that merged or edited an adapter. `reference_model` is a separate model instead,
    tuned elsewhere or larger; where its tokenizer is another, the losses of whole answers are compared all the same. The model trained on the selection
    starts from the base again, not from the reference. A reference that has seen the rows for several epochs has memorised noise, which then looks learnable:
    one short epoch is enough, and more is warned of.

    The single ranking decides, as in the paper. It does not reject what the model knows already: a loss falling from 0.10 to 0.01 scores 0.9. `floor` does; the
    paper has no such bound. `score: difference` is the plain L_base - L_ref of whole answers, which follows their length (RHO-LM): a weaker rule, to compare
    with. Ties go by row_id.
    """

    paper: ClassVar[str] = "LoBaSS: Gauging Learnability in Supervised Fine-tuning Data"
    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "peft")
    reason: ClassVar[str] = "less learnable than those kept"

    reference: Ref | None = Field(default=None, description="Stage whose adapter makes the base model the reference model.")
    reference_model: str = Field(default="", description="A separate reference model, named as `model` is, instead of an adapter.")
    score: Literal["ratio", "difference"] = Field(default="ratio", description="What rows are ranked by: 1 - L_ref / L_base, or L_base - L_ref (nats a row).")
    floor: float | None = Field(default=None, ge=0, description="Leave out rows whose base loss (nats a token) is below this: known already. Not in the paper.")

    @model_validator(mode="after")
    def _one_reference(self) -> Lobass:
        if bool(self.reference) == bool(self.reference_model):
            raise ValueError("give either reference, a stage that makes an adapter, or reference_model")
        return self

    def externals(self, env: Environment) -> dict[str, Any]:
        if not self.reference_model:
            return {}
        from ftpipe.models.loading import identity

        return {"reference_model": {k: v for k, v in identity(self.reference_model, env).items() if k != "model"}}

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.models.scores import score_rows

        reference = ctx.inputs[self.reference] if self.reference else None
        if reference is not None and not reference.has("adapter"):
            raise ConfigError(f"reference: {self.reference} is a {reference.kind} stage, which makes no adapter", where=ctx.name,
                              remedy="name a train stage")
        limit = self.limit(rows, ctx)
        learnt = self._seen(reference, rows, ctx)
        before = score_rows(rows, ctx, model=ctx.model, want=("loss",))
        after = score_rows(rows, ctx, model=self.reference_model or ctx.model, want=("loss",), adapter=reference)
        there = after["nll"].to_numpy()
        score = learnability(before["nll"].to_numpy(), there) if self.score == "ratio" else before["nll"].to_numpy() - there
        base = before["loss"].to_numpy()
        reason = np.full(len(score), None, dtype=object)
        reason[base < (self.floor or 0)] = FLOOR
        reason[base == 0] = ZERO
        reason[np.isnan(there)] = UNKNOWN_THERE
        reason[np.isnan(base)] = UNKNOWN
        open_to = np.flatnonzero(np.equal(reason, None))
        order = open_to[np.argsort(-score[open_to], kind="stable")]
        # the cost table and the scores are both in ascending order of row_id
        taken = limit.first(order)
        times = np.zeros(len(score), dtype=np.int64)
        times[taken] = 1
        column = pa.array(score, pa.float64(), mask=np.isnan(score))
        name = "learnability" if self.score == "ratio" else "loss_difference"
        ctx.annotate(pa.table({"row_id": before["row_id"], name: column, "loss_base": before["loss"], "loss_reference": after["loss"]}))
        ctx.report(self._summary(before, after, score, taken) | learnt)
        return pa.table({"row_id": before["row_id"], "times": times, "score": column, "reason": pa.array(reason.tolist(), pa.string())})

    def _seen(self, reference: Artifact | None, rows: RowSet, ctx: StepContext) -> dict[str, object]:
        """What share of the rows here the reference was trained on, and how often at most; warns of several times."""
        if reference is None or not reference.has("seen.parquet"):
            return {}
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        seen = pq.read_table(reference.file("seen.parquet"), columns=["row_id", "times"])
        here = pc.is_in(seen["row_id"], value_set=rows.table(columns=["row_id"])["row_id"].combine_chunks())
        most = pc.max(seen["times"]).as_py() or 0
        if most > 1:
            ctx.log.warning("%s saw rows up to %d times: what it has memorised looks learnable; one short epoch is enough", self.reference, most)
        return {"reference_saw": {"share_of_rows": (pc.sum(here).as_py() or 0) / max(rows.count(), 1), "most_times": most}}

    def _summary(self, before: pa.Table, after: pa.Table, score: np.ndarray, taken: np.ndarray) -> dict[str, object]:
        """What the report shows: how many improved, and how far the score follows the length, against the plain difference (RHO-LM)."""
        import numpy as np
        from scipy.stats import spearmanr

        known = ~np.isnan(score)
        base, reference = before["nll"].to_numpy()[known], after["nll"].to_numpy()[known]
        length, there = (t["trained_tokens"].to_numpy()[known] for t in (before, after))

        def follows(values: np.ndarray) -> float | None:
            varied = known.sum() > 2 and np.ptp(values) > 0 and np.ptp(length) > 0
            return float(spearmanr(values, length).statistic) if varied else None

        return {"n": len(score), "scored": int(known.sum()), "improved": int((score[known] > 0).sum()), "chosen": len(taken),
                "lowest_chosen": float(score[taken].min()) if len(taken) else None, "reference": self.reference or self.reference_model,
                "loss_base": float(base.sum() / max(length.sum(), 1)), "loss_reference": float(reference.sum() / max(there.sum(), 1)),
                "same_tokens": bool((length == there).all()), "spearman_length": {"score": follows(score[known]), "difference": follows(base - reference)}}

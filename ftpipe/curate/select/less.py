"""LESS: rows whose training step would lower the loss of target rows most, by the similarity of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import HELDOUT, TRAIN, RowSet
from ftpipe.errors import ConfigError, DataError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ftpipe.curate.gradients import RowGradients

UNKNOWN = "no gradient: nothing is trained on"


def similarities(vectors: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(n, g) cosine similarities of (n, d) vectors and (g, d) directions; NaN for a vector of zeros."""
    import numpy as np

    norms = np.linalg.norm(vectors, axis=1)[:, None] * np.linalg.norm(directions, axis=1)[None]
    # einsum without BLAS: the sums are the same whatever the number of threads
    products = np.einsum("nd,gd->ng", vectors, directions)
    return np.divide(products, norms, out=np.full(products.shape, np.nan), where=norms > 0)


class Less(Selector):
    """Ranks rows by gradient influence on target rows (Xia et al. 2024) and takes from the top until the budget is full.

    The reference is a LoRA adapter that was warmed up on a part of the rows. For each row the gradient g of its mean token loss is taken with respect to the
    LoRA parameters there; the target's gradient is that of the mean loss of its rows. The score is the cosine similarity of the two: minus it, times the
    length of the target's gradient, is to first order how the target's loss changes for each unit of length of a step along -g. The length of g, which
    is larger for short rows, does not count. With the state of AdamW (a train stage with `keep_optimizer: true`), a row's gradient is replaced by the update
    that AdamW would make of it; without, plain gradient descent is assumed, and the report says which.

    Several references (the same warm-up ended after one epoch, two, ...) are summed with the mean learning rate of each one's last epoch as weight (equal
    ones where it is not known). Where the target is of several kinds (`by`), a row has the score of the kind that it serves best.

    Gradients are projected to `dimensions` numbers by a count sketch (the paper: dense random signs, which have the same variance and cost far more); a cosine
    is then off by about 1 / sqrt(dimensions). They are kept in the workspace's cache, 4 bytes a number, and taken one row at a time, forward and backward.
    """

    uses_model: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "peft", "numpy")
    reason: ClassVar[str] = "less influence than those kept"

    reference: Ref | list[Ref] = Field(description="Train stage whose LoRA adapter is the warmed-up model, or several: its checkpoints.")
    target: Ref | None = Field(default=None, description="Stage whose train rows say what the model is to become good at; by default the held-out rows, which "
                               "are then no honest test of the result any more.")
    by: Literal["all", "source", "group"] = Field(default="all", description="What makes target rows one kind: nothing, their source or their group.")
    dimensions: int = Field(default=8192, ge=0, description="Numbers a gradient is projected to; 0 keeps it whole.")
    adam: bool | None = Field(default=None, description="Take AdamW's update of a row's gradient (true), or the gradient (false); by default the first where "
                              "every reference kept its optimizer's state.")
    max_length: int | None = Field(default=None, ge=2, description="Tokens a row is cut to; the model's context by default.")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Type of the forward pass.")

    @field_validator("reference")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and (not value or len(set(value)) < len(value)):
            raise ValueError("name at least one reference, and each once")
        return value

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.curate.gradients import RowGradients, adamw_settings, has_state, learning_rate

        names = [self.reference] if isinstance(self.reference, str) else self.reference
        references = [ctx.inputs[n] for n in names]
        for name, reference in zip(names, references):
            if not reference.has("adapter"):
                raise ConfigError(f"reference: {name} is a {reference.kind} stage, which makes no adapter", where=ctx.name, remedy="name a train stage")
        limit = self.limit(rows, ctx)
        adam = all(map(has_state, references)) if self.adam is None else self.adam
        kinds, members = self._target(rows, ctx)
        train = rows.table(TRAIN, ["row_id", "content_id"]).sort_by("row_id")
        influence: dict[str, np.ndarray] = {}
        rates = [learning_rate(r) for r in references]
        weights = [r / sum(rates) for r in rates] if all(rates) else [1 / len(rates)] * len(rates)
        for reference in references if adam else ():
            adamw_settings(reference, ctx.name)  # what is not there is said before long work
        for reference, weight in zip(references, weights):
            gradients = RowGradients(ctx, model=ctx.model, adapter=reference, dimensions=self.dimensions, seed=self._seed(ctx), dtype=self.dtype,
                                     max_length=self.max_length)
            directions = self._directions(gradients, rows, ctx, kinds, members)
            for content, found in self._similar(gradients, rows, directions, adam):
                influence[content] = influence.get(content, 0.0) + weight * found
        table = np.stack([influence[c] for c in train["content_id"].to_pylist()])
        known = ~np.isnan(table).any(axis=1)
        score = np.where(known, np.max(np.nan_to_num(table, nan=-np.inf), axis=1), np.nan)
        best = table.argmax(axis=1)
        order = np.flatnonzero(known)
        order = order[np.argsort(-score[order], kind="stable")]
        # the cost table and the scores are both in ascending order of row_id
        taken = limit.first(order)
        times = np.zeros(len(score), dtype=np.int64)
        times[taken] = 1
        column = pa.array(score, pa.float64(), mask=~known)
        served = pa.array([kinds[k] if ok else None for k, ok in zip(best, known)], pa.string())
        ctx.annotate(pa.table({"row_id": train["row_id"], "influence": column, "influence_on": served}))
        ctx.report({"n": len(score), "scored": int(known.sum()), "chosen": len(taken), "lowest_chosen": float(score[taken].min()) if len(taken) else None,
                    "references": [{"stage": n, "weight": w} for n, w in zip(names, weights)],
                    "update": "adamw" if adam else "gradient", "dimensions": self.dimensions, "target": self.target or "held-out rows",
                    "kinds": [{"name": k, "contents": len(m), "served": int((best[taken] == i).sum())} for i, (k, m) in enumerate(zip(kinds, members))],
                    "projection_error": self.dimensions ** -0.5 if self.dimensions else 0.0})
        return pa.table({"row_id": train["row_id"], "times": times, "score": column,
                         "reason": pa.array([None if ok else UNKNOWN for ok in known.tolist()], pa.string())})

    def _seed(self, ctx: StepContext) -> int:
        return int(ctx.generator("projection").integers(2**31))

    def _target(self, rows: RowSet, ctx: StepContext) -> tuple[list[str], list[set[str]]]:
        """Names of the kinds of target rows, ascending, and the contents of each."""
        source, split = self._asked(rows, ctx)
        by = "'all'" if self.by == "all" else f'"{self.by}"'
        with source.view() as con:
            lines = con.execute(f"select distinct {by} as kind, content_id from rows where split = $split order by kind, content_id",
                                {"split": split}).fetchall()
        if not lines:
            raise DataError(f"{source.artifact.name} has no {'held-out' if split == HELDOUT else 'train'} rows to be the target",
                            where=f"{ctx.name} (less.target)", remedy="hold rows out in the ingest stage, or name a stage of target rows")
        if self.target is None:
            ctx.log.warning("rows are chosen for the held-out rows: a loss on these is no honest test of the result any more")
        kinds = sorted({k for k, _ in lines})
        return kinds, [{c for k, c in lines if k == kind} for kind in kinds]

    def _asked(self, rows: RowSet, ctx: StepContext) -> tuple[RowSet, str]:
        return (rows, HELDOUT) if self.target is None else (RowSet(ctx.inputs[self.target]), TRAIN)

    def _directions(self, gradients: RowGradients, rows: RowSet, ctx: StepContext, kinds: list[str], members: list[set[str]]) -> np.ndarray:
        """(kinds, d) float64: the projected gradient of the mean loss of each kind's rows. A projection is linear, so it is the mean of theirs."""
        import numpy as np

        total: list[Any] = [0.0] * len(kinds)
        count = [0] * len(kinds)
        for contents, vectors in gradients.of(*self._asked(rows, ctx)):
            for content, vector in zip(contents, vectors):
                for k, member in enumerate(members):
                    if vector is not None and content in member:
                        total[k], count[k] = total[k] + vector.astype(np.float64), count[k] + 1
        empty = [kind for kind, n, t in zip(kinds, count, total) if not n or not np.any(t)]
        if empty:
            raise DataError(f"the target rows of {empty[0]!r} have no gradient: nothing is trained on in them", where=f"{ctx.name} (less.target)",
                            remedy="target rows need answers")
        return np.stack([t / n for t, n in zip(total, count)])

    def _similar(self, gradients: RowGradients, rows: RowSet, directions: np.ndarray, adam: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Each content of the train rows and its similarity to each direction, (kinds,); NaN where it has no gradient."""
        import numpy as np

        for contents, vectors in gradients.of(rows, TRAIN, adam=adam):
            nothing = np.zeros(directions.shape[1])
            yield from zip(contents, similarities(np.stack([nothing if v is None else v.astype(np.float64) for v in vectors]), directions))

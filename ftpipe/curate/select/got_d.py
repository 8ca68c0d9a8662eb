"""GOT-D: keep the rows whose added mass would bring the pool's distribution closest to a target's."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import HELDOUT, TRAIN, RowSet
from ftpipe.errors import DataError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ftpipe.curate.select._transport import Potentials

UNKNOWN = "no embedding: the row cannot be rendered"
SAVE_SECONDS = 20.0
"""At most so much work is lost by a kill."""


class GotD(Selector):
    """Ranks rows by the gradient of the optimal transport distance between target and pool, lowest first, and takes until the budget is full.

    Target and pool are clouds of embeddings with equal weights and squared Euclidean costs. The dual potential g of the entropic problem on the pool's side
    says how the distance changes when a row gains mass; the calibrated gradient, g_i less the mean of the others, is what is ranked. It differs from
    similarity to the target: a row near a part of the target that the pool covers already gains little. One solution ranks all rows; ties go by row_id.

    The paper embeds texts cut to one length with a small encoder tuned on the target task; here it is the mean of the base model's last hidden states over the
    row's own tokens. `epsilon` is a share of the mean cost, because an absolute one (the paper's 0.1) means something else in every space; `absolute: true`
    takes it as it is. The paper's tolerance, 0.1, leaves potentials that have not converged, so the default here is lower. The paper's preselection of whole
    sources by their distance is not part of this step.

    One pass over the costs needs (target rows) x (pool rows) distances, at most some millions of them in memory at once; choose a target of some hundred rows.
    With held-out rows as the target, what is measured on those rows later is no longer independent of the choice.
    """

    paper: ClassVar[str] = "Get more for less: Principled Data Selection for Warming Up Fine-Tuning in LLMs"
    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "numpy")
    reason: ClassVar[str] = "others bring the pool closer to the target"

    target: Ref | None = Field(default=None, description="Stage whose train rows are the target; without it the held-out rows of the rows at hand.")
    epsilon: float = Field(default=0.05, gt=0, description="Strength of the entropy, as a share of the mean cost.")
    absolute: bool = Field(default=False, description="Take epsilon in units of the squared distance, as the paper does.")
    normalize: bool = Field(default=False, description="Scale embeddings to length 1 first.")
    momentum: float = Field(default=1.3, ge=1, lt=2, description="Over-relaxation of the iteration; 1 is plain Sinkhorn. It changes the speed, not the result.")
    tolerance: float = Field(default=1e-3, gt=0, lt=2, description="Mass in the wrong place at which the iteration stops.")
    max_iterations: int = Field(default=2000, ge=1, description="Passes over the costs, at the most.")

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from ftpipe.curate.select._transport import calibrated, mean_cost, sinkhorn, value
        from ftpipe.models.loading import default_device

        limit = self.limit(rows, ctx)
        there = RowSet(ctx.inputs[self.target]) if self.target is not None else rows
        _, goal = self._embedded(there, ctx, TRAIN if self.target is not None else HELDOUT)
        ids, points = self._embedded(rows, ctx, TRAIN)
        usable = np.flatnonzero(ids["known"].to_numpy(zero_copy_only=False))
        if not len(goal) or not len(usable):
            side = f"the target ({self.target or 'held-out rows'})" if len(usable) else "the pool"
            raise DataError(f"{side} holds no row that can be embedded", where=f"{ctx.name} (got_d)", remedy="name another stage as `target`")
        scale = mean_cost(goal, points)
        epsilon = self.epsilon if self.absolute else (self.epsilon * scale or 1.0)  # no distances at all: any epsilon will do
        found = sinkhorn(goal, points, epsilon=epsilon, momentum=self.momentum, tolerance=self.tolerance, max_iterations=self.max_iterations,
                         device=default_device(), **self._saved(ctx, len(goal), len(usable)))
        if found.error >= self.tolerance:
            ctx.log.warning("the transport did not converge in %d passes: %.2g of the mass is in the wrong place; raise epsilon or max_iterations",
                            found.iterations, found.error)
        gradient = calibrated(found.pool)
        order = usable[np.argsort(gradient, kind="stable")]
        # the cost table and the scores are both in ascending order of row_id
        taken = limit.first(order)
        times = np.zeros(ids.num_rows, dtype=np.int64)
        times[taken] = 1
        scores = np.full(ids.num_rows, np.nan)
        scores[usable] = gradient
        column = pa.array(scores, pa.float64(), mask=np.isnan(scores))
        reason = pa.array([None if k else UNKNOWN for k in ids["known"].to_pylist()], pa.string())
        ctx.annotate(pa.table({"row_id": ids["row_id"], "transport_gradient": column}))
        ctx.report({"n": ids.num_rows, "embedded": len(usable), "target_rows": len(goal), "chosen": len(taken), "epsilon": epsilon, "mean_cost": scale,
                    "iterations": found.iterations, "error": found.error, "converged": found.error < self.tolerance, "distance": value(found),
                    "slope": float(scores[taken].mean()) if len(taken) else None})
        return pa.table({"row_id": ids["row_id"], "times": times, "score": column, "reason": reason})

    def _embedded(self, rows: RowSet, ctx: StepContext, split: str) -> tuple[pa.Table, np.ndarray]:
        """row_id and known of each row, in ascending order of row_id, and the (n, d) embeddings (float32) of those that have one."""
        import numpy as np
        import pyarrow as pa

        from ftpipe.models.scores import score_rows

        table = score_rows(rows, ctx, model=ctx.model, split=split, want=("embedding",))
        known = table["embedding"].is_valid()
        chunks = [c.flatten().to_numpy(zero_copy_only=False) for c in table["embedding"].chunks]
        n = known.to_numpy().sum()
        flat = chunks[0] if len(chunks) == 1 else np.concatenate([np.zeros(0, np.float32), *chunks])
        points = flat.reshape(n, -1) if n else np.zeros((0, 1), np.float32)
        if self.normalize:
            points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        return pa.table({"row_id": table["row_id"], "known": known}), points

    def _saved(self, ctx: StepContext, m: int, n: int) -> dict[str, Any]:
        """Arguments of `sinkhorn` that let a killed run go on where it was."""
        import numpy as np

        from ftpipe.curate.select._transport import Potentials

        path = ctx.work / "potentials.npz"
        start = None
        if path.exists():
            with np.load(path, allow_pickle=False) as kept:
                start = Potentials(kept["target"], kept["pool"], float(kept["error"]), int(kept["iterations"]))
        last = time.monotonic()

        def after(now: Potentials) -> None:
            nonlocal last
            ctx.progress(now.iterations, self.max_iterations, "passes", error=now.error)
            if time.monotonic() - last >= SAVE_SECONDS:
                _save(path, now)
                last = time.monotonic()

        return {"start": start, "after": after}


def _save(path: Path, now: Potentials) -> None:
    import numpy as np

    temporary = path.with_name("potentials.tmp.npz")
    np.savez(temporary, target=now.target, pool=now.pool, error=now.error, iterations=now.iterations)
    os.replace(temporary, path)

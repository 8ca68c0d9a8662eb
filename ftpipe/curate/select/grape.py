"""GRAPE: of several answers to one prompt keep the one that the base model finds likeliest."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ftpipe.canonical import canonical_json
from ftpipe.curate.draw import uniforms
from ftpipe.curate.select.base import Selector
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import pyarrow as pa

OTHER, AGAIN, FEW = "another answer to the prompt was kept", "the same answer to the same prompt again", "too few different answers to the prompt"
WINDOW = 20
"""Characters of a passage that counts as repeated."""


def repetition(text: str) -> float:
    """Share of the passages of 20 characters that occurred in the text before, runs of white space counted as one blank; 0 for a shorter text."""
    text = " ".join(text.split())
    n = len(text) - WINDOW + 1
    return 1 - len({text[i:i + WINDOW] for i in range(n)}) / n if n > 0 else 0.0


class Grape(Selector):
    """For each prompt, ranks its answers by the mean log-probability of an answer's token under the base model and keeps the best.

    Rows with the same turns before the last answer are answers to one prompt; every prompt keeps `per_prompt` of them, or all if it has fewer. It chooses
    answers, never prompts: filter wrong answers out before it, or a wrong one that fits will win. A row of plain text is a prompt of its own and stays.

    As in the paper, the model is shown `template` in plain text, not its chat template, and the mean is over the answer's tokens, without an end token (a sum
    would favour short answers). The mean still favours text that goes round in circles, so answers of more than `repetition` repeated passages (not in the
    paper) come after all others of their prompt. The same answer twice counts once; ties go by row_id. What the model's context cuts off is not scored.
    """

    paper: ClassVar[str] = "The Best Instruction-Tuning Data are Those That Fit"
    uses_model: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    reason: ClassVar[str] = OTHER

    per_prompt: int = Field(default=1, ge=1, description="Answers that a prompt keeps, at most.")
    like: Ref | None = Field(default=None, description="Keep as many answers of a prompt as it has among the train rows of this stage; `per_prompt` if none.")
    least: int = Field(default=1, ge=1, description="Leave out prompts with fewer different answers than this; the paper asks for 2.")
    template: str | None = Field(default="Question: {prompt}\nAnswer: {answer}", description="What the model is shown; null is the row as it is trained on.")
    pick: Literal["likeliest", "unlikeliest", "random"] = Field(default="likeliest", description="Which answers stay; the others are the paper's controls.")
    repetition: float | None = Field(default=0.5, gt=0, lt=1, description="Share of repeated passages above which an answer comes last; null does not look.")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Type of the forward pass; log-probabilities are taken in float32.")

    @field_validator("template")
    @classmethod
    def _places(cls, value: str | None) -> str | None:
        if value is not None and (value.count("{prompt}") != 1 or value.count("{answer}") != 1 or not value.endswith("{answer}")):
            raise ValueError("a template has {prompt} once and ends in {answer}")
        return value

    @model_validator(mode="after")
    def _no_budget(self) -> Grape:
        if self.budget is not None:
            raise ValueError("grape keeps answers by the prompt and takes no budget; put another selector after it")
        return self

    def choose(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        ids, prompt, answer, repeats = _read(rows)
        prompts, group = np.unique(prompt, return_inverse=True)
        _, first, rep = np.unique(np.char.add(prompt, answer), return_index=True, return_inverse=True)
        rep = first[rep]  # ids ascend and np.unique gives first places, so of equal answers the lowest row_id stands for all
        different = np.bincount(group[first], minlength=len(prompts))
        contested = different[group] > 1
        fit, table = self._fit(rows, ctx, ids, contested)
        last = repeats > self.repetition if self.repetition is not None else np.zeros(len(ids), dtype=bool)
        by = {"likeliest": -fit, "unlikeliest": fit, "random": uniforms(pa.array(ids), ctx.seed, self.name())}[self.pick]
        order = first[np.lexsort((first, by[first], last[first], group[first]))]  # NaN, an answer without a score, comes last
        begins = np.searchsorted(group[order], np.arange(len(prompts)))
        place = np.arange(len(order)) - begins[group[order]]
        kept = np.zeros(len(ids), dtype=bool)
        kept[order] = place < self._wanted(ctx, prompts)[group[order]]
        few = different[group] < self.least
        kept &= ~few
        best = order[begins][group]
        reason = np.where(few, FEW, np.where(rep != np.arange(len(ids)), AGAIN, OTHER)).astype(object)
        reason[kept] = None
        keeper = [None if kept[i] or few[i] else ids[rep[i] if kept[rep[i]] else best[i]] for i in range(len(ids))]
        score = pa.array(fit, pa.float64(), mask=np.isnan(fit))
        ctx.annotate(pa.table({"row_id": ids, "prompt_hash": pa.array(prompt).cast(pa.string()), "fit": score, "repetition": repeats}))
        ctx.report(self._summary(fit, table, contested & ~few, kept, group, last))
        return pa.table({"row_id": ids, "times": kept.astype(np.int64), "score": score, "reason": pa.array(reason.tolist(), pa.string()),
                         "keeper": pa.array(keeper, pa.string())})

    def _fit(self, rows: RowSet, ctx: StepContext, ids: list[str], contested: np.ndarray) -> tuple[np.ndarray, pa.Table]:
        """(n,) mean log-probability of an answer's token, NaN where there is nothing to choose between, and the table of scores."""
        import numpy as np

        from ftpipe.data.forms import Template
        from ftpipe.models.scores import score_rows

        asked = [i for i, c in zip(ids, contested) if c]
        table = score_rows(rows, ctx, model=ctx.model, want=("loss",), only=asked, dtype=self.dtype, form=Template(self.template) if self.template else None)
        fit = np.full(len(ids), np.nan)
        fit[contested] = -table["loss"].to_numpy()  # both in ascending order of row_id
        return fit, table

    def _wanted(self, ctx: StepContext, prompts: np.ndarray) -> np.ndarray:
        import numpy as np

        if self.like is None:
            return np.full(len(prompts), self.per_prompt)
        there = Counter(_read(RowSet(ctx.inputs[self.like]))[1].tolist())
        return np.array([there.get(p, self.per_prompt) for p in prompts.tolist()])

    def _summary(self, fit: np.ndarray, table: pa.Table, contested: np.ndarray, kept: np.ndarray, group: np.ndarray, last: np.ndarray) -> dict[str, Any]:
        """How well the kept answers fit, against all those there were to choose from, and how long they are."""
        import numpy as np

        length = np.full(len(fit), np.nan)
        length[~np.isnan(fit)] = table["trained_tokens"].to_numpy()[table["loss"].is_valid().to_numpy()]

        def mean(values: np.ndarray, where: np.ndarray) -> float | None:
            where = where & ~np.isnan(values)
            return float(values[where].mean()) if where.any() else None

        return {"prompts": len(np.unique(group[kept])), "prompts_with_a_choice": len(np.unique(group[contested])), "answers": len(fit), "kept": int(kept.sum()),
                "repeating": int(last.sum()), "repeating_kept": int((last & kept).sum()), "pick": self.pick,
                "fit": {"kept": mean(fit, contested & kept), "all": mean(fit, contested)},
                "tokens": {"kept": mean(length, contested & kept), "all": mean(length, contested)}}


def _read(rows: RowSet) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Of each train row, in ascending order of row_id: row_id, a hash of its prompt and one of its answer (hex), and how much the answer repeats itself."""
    import numpy as np

    found = list(_lines(rows))
    ids, prompt, answer, repeats = zip(*found) if found else ((), (), (), ())
    return list(ids), np.array(prompt, dtype="S32"), np.array(answer, dtype="S32"), np.array(repeats, dtype=np.float64)


def _lines(rows: RowSet) -> Iterator[tuple[str, str, str, float]]:
    from ftpipe.data.forms import exchange

    table = rows.table(columns=["row_id", "messages", "chosen"]).sort_by("row_id")
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            found = exchange(row)
            turns, said = found if found is not None else (row["row_id"], "")
            yield row["row_id"], _hash(turns), _hash(said.strip()), repetition(said)


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]

"""CLEAR: keep the rows whose answer the model is confident of, and replace some of the others by better answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.curate.asking import Asker, in_parts
from ftpipe.curate.filter.base import Filter
from ftpipe.curate.step import StepContext
from ftpipe.data.forms import exchange, said
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError, DataError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.models.service import ModelService

PART = 32
"""Rows answered or judged together; at most so many are lost by a kill."""
CORRECTIONS = "corrections.parquet"
LOW, UNKNOWN, REPLACED = "not confident enough", "no confidence is known", "replaced by a better answer"
JUDGE = ("Question: {question}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\nWhich answer to the question is better, A or B?\nReply with one letter.")


class Clear(Filter):
    """Auto-filter: keeps exactly the rows whose confidence lies above the median of all (rows at the median go, so do rows without one).

    The confidence is an annotation of an earlier step (`bsdetector`), made with the base model. The median drops half of the rows even where all are clean.

    Auto-correct, with `corrector`, the train stage that was trained on what the filter kept: for each row that was not kept, the base model with that adapter
    answers the prompt (greedily); the base model alone is asked which answer is better, with both orders of showing them; where it is the new one with a
    confidence above `eta`, the row makes way for a new one with that answer, its parent recorded. The other rows are dropped, the confident ones stay as
    they are. The confidence of the verdict is beta O + (1 - beta) S as in `bsdetector`, O being the probability of the letter that stands for the new answer
    (the limit of asking many times), S whether the model finds that letter a correct reply to the question which is better; both are means over the orders.
    `corrections.parquet` keeps each candidate and verdict. Apply it to the rows that the filter saw, not to those it kept. Rows of preference pairs are
    only filtered. That rows neither confident nor corrected go is how secondary sources describe the paper.
    """

    paper: ClassVar[str] = "Automated Data Curation for Robust Language Model Fine-Tuning"
    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "peft")
    needs: ClassVar[tuple[str, ...]] = ("the annotation `confidence`",)

    by: str = Field(default="confidence", description="Annotation that holds the confidence.")
    above: float | None = Field(default=None, ge=0, le=1, description="gamma: confidence that a row must exceed; the median of the rows by default.")
    corrector: Ref | None = Field(default=None, description="Train stage whose adapter writes new answers; without one rows are only dropped.")
    eta: float = Field(default=0.8, ge=0, le=1, description="Confidence that the verdict for a new answer must exceed.")
    beta: float = Field(default=0.7, ge=0, le=1, description="Weight of the verdict's probability against the reflection on it.")
    max_new_tokens: int = Field(default=512, ge=1, description="Most tokens of a new answer; one that is cut there is not used.")
    batch_size: int = Field(default=8, ge=1, description="Prompts answered together.")

    def judge(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        found = rows.annotation(self.by)
        if found is None:
            raise DataError(f"no step before this one annotates {self.by!r}", where=f"{ctx.name} (clear.by)", remedy="put `bsdetector` before it")
        ids = rows.table(columns=["row_id"]).sort_by("row_id")
        confidence = ids.join(found, "row_id").sort_by("row_id")[self.by].to_numpy().astype(np.float64)
        known = ~np.isnan(confidence)
        if not known.any():
            raise DataError(f"no row has a {self.by}", where=f"{ctx.name} (clear.by)", remedy="see the report of the step that should have found it")
        gamma = float(np.median(confidence[known])) if self.above is None else self.above
        reason = np.full(len(confidence), LOW, dtype=object)
        reason[~known] = UNKNOWN
        reason[confidence > gamma] = None
        summary: dict[str, Any] = {"n": len(confidence), "gamma": gamma, "at_gamma": int((confidence == gamma).sum()), "kept": int((confidence > gamma).sum()),
                                   "without_confidence": int((~known).sum())}
        if self.corrector is not None:
            low = ids["row_id"].filter(pa.array(reason == LOW)).combine_chunks()
            verdicts = self._correct(rows, ctx, low)
            replaced = pa.array([v["row_id"] for v in verdicts if v["replaces"]], pa.string())
            reason[pc.is_in(ids["row_id"], value_set=replaced).to_numpy()] = REPLACED
            judged = [v for v in verdicts if v["confidence"] is not None]
            summary |= {"asked": len(low), "judged": len(judged), "replaced": len(replaced), "eta": self.eta,
                        "orders_disagree": sum((v["first_order"] > 0.5) != (v["second_order"] > 0.5) for v in judged)}
        ctx.report(summary)
        return pa.table({"row_id": ids["row_id"], "kept": pa.array(np.equal(reason, None)), "reason": pa.array(reason.tolist(), pa.string()),
                         "score": pa.array(confidence, mask=~known)})

    def replacements(self, rows: RowSet, ctx: StepContext) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        if self.corrector is None:
            return
        made = {v["row_id"]: v for v in pq.read_table(ctx.out / CORRECTIONS).to_pylist() if v["replaces"]}
        for row in _asked(rows, set(made)):
            verdict = made[row["row_id"]]
            turns = [*row["turns"], {"role": "assistant", "content": verdict["candidate"]}]
            meta = {"corrector": self.corrector, "confidence": verdict["confidence"]}
            yield {"format": "messages", "messages": turns, "parents": [row["row_id"]], "meta": meta}

    def _correct(self, rows: RowSet, ctx: StepContext, low: pa.Array) -> list[dict[str, Any]]:
        """Candidates and verdicts for the rows `low`, also written to `corrections.parquet`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ftpipe.models.service import ModelService

        corrector = ctx.inputs[self.corrector]
        if not corrector.has("adapter"):
            raise ConfigError(f"corrector: {self.corrector} is a {corrector.kind} stage, which makes no adapter", where=ctx.name, remedy="name a train stage")
        asked = list(_asked(rows, set(low.to_pylist())))
        opened: list[ModelService] = []

        def service(adapter: Any) -> ModelService:
            if not opened:
                opened.append(ModelService.open(ctx.model, ctx.env, adapter=adapter))
            return opened[0]

        answered = in_parts(ctx, "answers", asked, PART, lambda part: self._answer(part, service(corrector.file("adapter"))))
        opened.clear()  # one model in memory at a time
        new = [a for a in answered if a["candidate"] is not None and a["candidate"].strip() != a["answer"].strip()]
        verdicts = {v["row_id"]: v for v in in_parts(ctx, "verdicts", new, PART, lambda part: self._compare(part, Asker(service(None))))}
        numbers = ("first_order", "second_order", "consistency", "reflection", "confidence")
        unasked = dict.fromkeys(numbers) | {"replaces": False}
        lines = [{**unasked, "row_id": a["row_id"], "candidate": a["candidate"], **verdicts.get(a["row_id"], {})} for a in answered]
        schema = pa.schema([("row_id", pa.string()), ("candidate", pa.string()), *((n, pa.float64()) for n in numbers), ("replaces", pa.bool_())])
        pq.write_table(pa.Table.from_pylist(lines, schema=schema), ctx.out / CORRECTIONS, compression="zstd")
        return lines

    def _answer(self, part: Sequence[dict[str, Any]], service: ModelService) -> list[dict[str, Any]]:
        """The corrector's answer to each prompt; None where the prompt does not fit, or the answer is cut or empty."""
        prompts = Asker(service).prompts([row["turns"] for row in part], self.max_new_tokens)
        made = iter(service.generate([p for p in prompts if p is not None], max_new_tokens=self.max_new_tokens, batch_size=self.batch_size))
        found = [next(made) if p is not None else None for p in prompts]
        return [{"row_id": row["row_id"], "question": said(row["turns"]), "answer": row["answer"],
                 "candidate": a.text if a is not None and a.finished and a.text.strip() else None} for row, a in zip(part, found)]

    def _compare(self, part: Sequence[dict[str, Any]], asker: Asker) -> list[dict[str, Any]]:
        """The base model's verdict on each candidate. `first_order`, `second_order`: probability that the candidate is better, shown as B and as A."""
        orders = [JUDGE.format(question=p["question"], first=p["answer"], second=p["candidate"]) for p in part], \
            [JUDGE.format(question=p["question"], first=p["candidate"], second=p["answer"]) for p in part]
        better = asker.choose(orders[0], "AB")[:, 1].tolist(), asker.choose(orders[1], "AB")[:, 0].tolist()
        sure = [asker.reflect([(q, letter) for q in questions]).tolist() for questions, letter in zip(orders, "BA")]
        lines = []
        for n, row in enumerate(part):
            o, s = (better[0][n] + better[1][n]) / 2, (sure[0][n] + sure[1][n]) / 2
            confidence = self.beta * o + (1 - self.beta) * s
            if not math.isnan(confidence):
                lines.append({"row_id": row["row_id"], "first_order": better[0][n], "second_order": better[1][n], "consistency": o, "reflection": s,
                              "confidence": confidence, "replaces": o > 0.5 and confidence > self.eta})
        return lines


def _asked(rows: RowSet, ids: set[str]) -> Iterator[dict[str, Any]]:
    """row_id, turns (before the answer) and answer of the conversations among `ids`, in ascending order of row_id."""
    table = rows.table(columns=["row_id", "format", "messages", "chosen"]).sort_by("row_id")
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            found = exchange(row) if row["format"] == "messages" and row["row_id"] in ids else None
            if found is not None:
                yield {"row_id": row["row_id"], "turns": found[0], "answer": found[1]}

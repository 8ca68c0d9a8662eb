"""BSDetector's confidence in the answer of each row: does the model answer alike when it is asked, and does it find the answer correct?"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.curate.asking import Asker, in_parts
from ftpipe.curate.score.base import Scorer
from ftpipe.curate.step import StepContext
from ftpipe.data.forms import exchange, said
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.models.service import ModelService

PART = 32
"""Rows whose answers are kept together; at most so many are lost by a kill."""
CONTRADICTION = ("Question: {question}\n\nFirst answer: {first}\n\nSecond answer: {second}\n\nDo the two answers contradict each other?\n(A) yes\n(B) no\n"
                 "Reply with one letter.")
_WORD = re.compile(r"\w+")


class Bsdetector(Scorer):
    """Annotates `confidence` = beta O + (1 - beta) S in [0, 1], and its parts `consistency` (O) and `reflection` (S).

    The confidence is in the row's own answer y, not in what the model would say. O asks the model the row's prompt `samples` times and is the mean over its
    answers of alpha (1 - contradiction between the answer and y) + (1 - alpha) [it equals y, but for case and white space]. S puts y before the model in two
    wordings and is the mean of its reply, correct 1, incorrect 0, not sure 1/2; taken is the expectation over the probabilities of the three letters
    instead of one reply, so that nothing is drawn and nothing parsed.

    The paper of the detector (Chen and Mueller, 2024) takes the probability of contradiction from a model of natural language inference, both orders averaged.
    There is none here: `words` takes 1 - F1 of the words of the two texts, which is a similarity and blind to a single "not"; `model` asks the scored model
    itself in both orders. The defaults of alpha and beta are those of one re-implementation; others differ, and the paper's were not seen. `answers.parquet`
    keeps every answer (row_id, sample, answer, contradiction, equal). Rows of plain text, and what does not fit the model's context, get nulls. Equal rows
    are asked once.
    """

    paper: ClassVar[str] = "Automated Data Curation for Robust Language Model Fine-Tuning"
    uses_model: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    needs: ClassVar[tuple[str, ...]] = ("a chat template",)

    samples: int = Field(default=5, ge=1, description="k: answers that the model gives to each prompt.")
    temperature: float = Field(default=1.0, gt=0, description="Temperature of these answers.")
    max_new_tokens: int = Field(default=512, ge=1, description="Most tokens of an answer.")
    alpha: float = Field(default=0.8, ge=0, le=1, description="Weight of not contradicting, against being equal.")
    beta: float = Field(default=0.7, ge=0, le=1, description="Weight of the consistency, against the reflection.")
    contradiction: Literal["words", "model"] = Field(default="words", description="What tells whether two answers contradict each other.")
    batch_size: int = Field(default=8, ge=1, description="Prompts answered together. A row's answers depend on its neighbours unless this is 1.")

    def annotate(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = rows.table(columns=["row_id", "content_id", "messages", "chosen"]).sort_by([("content_id", "ascending"), ("row_id", "ascending")])
        items, known = [], set()
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                found = exchange(row)
                if found is not None and row["content_id"] not in known:
                    known.add(row["content_id"])
                    items.append((row["content_id"], *found))
        opened: list[ModelService] = []
        lines = in_parts(ctx, "rows", items, PART, lambda part: self._ask(part, ctx, opened))
        by = {line["content_id"]: line for line in lines}
        ids, contents = table["row_id"].to_pylist(), table["content_id"].to_pylist()
        answers = sorted(({"row_id": i, "sample": n, **a} for i, c in zip(ids, contents) for n, a in enumerate(by[c]["answers"] if c in by else ())),
                         key=lambda a: (a["row_id"], a["sample"]))
        schema = pa.schema([("row_id", pa.string()), ("sample", pa.int32()), ("answer", pa.string()), ("contradiction", pa.float64()), ("equal", pa.bool_())])
        pq.write_table(pa.Table.from_pylist(answers, schema=schema), ctx.out / "answers.parquet", compression="zstd")
        columns = {name: pa.array([by[c][name] if c in by else None for c in contents], pa.float64()) for name in ("confidence", "consistency", "reflection")}
        ctx.report({"n": len(ids), "different": len(items), "answered": len(lines), "alpha": self.alpha, "beta": self.beta, "samples": self.samples,
                    "contradiction": self.contradiction, "mean": sum(line["confidence"] for line in lines) / len(lines) if lines else None})
        return pa.table({"row_id": ids, **columns}).sort_by("row_id")

    def _ask(self, part: Sequence[tuple[str, Any, str]], ctx: StepContext, opened: list[ModelService]) -> list[dict[str, Any]]:
        """One line for each (content_id, turns, answer) that fits the model's context."""
        from ftpipe.models.service import ModelService

        if not opened:
            opened.append(ModelService.open(ctx.model, ctx.env))
        service, asker = opened[0], Asker(opened[0])
        prompts = asker.prompts([turns for _, turns, _ in part], self.max_new_tokens)
        asked = [(*one, prompt) for one, prompt in zip(part, prompts) if prompt is not None]
        drawn = [service.generate([prompt for *_, prompt in asked], max_new_tokens=self.max_new_tokens, temperature=self.temperature,
                                  batch_size=self.batch_size, seed=int(ctx.generator("sample", i).integers(2**31))) for i in range(self.samples)]
        reflection = asker.reflect([(said(turns), answer) for _, turns, answer, _ in asked])
        lines = []
        for n, (content, turns, answer, _) in enumerate(asked):
            answers = [d[n].text for d in drawn]
            against = contradictions(said(turns), answer, answers, asker if self.contradiction == "model" else None)
            found = [{"answer": a, "contradiction": c, "equal": _plain(a) == _plain(answer)} for a, c in zip(answers, against)]
            o, s = sum(self.alpha * (1 - f["contradiction"]) + (1 - self.alpha) * f["equal"] for f in found) / len(found), float(reflection[n])
            if not math.isnan(o + s):
                lines.append({"content_id": content, "answers": found, "consistency": o, "reflection": s, "confidence": self.beta * o + (1 - self.beta) * s})
        return lines


def contradictions(question: str, given: str, answers: Sequence[str], asker: Asker | None) -> list[float]:
    """How far each of `answers` contradicts the `given` one: by the model, mean of both orders, or, without one, 1 - F1 of the words."""
    if asker is None:
        return [1 - overlap(given, a) for a in answers]
    pairs = [pair for a in answers for pair in ((given, a), (a, given))]
    asked = [CONTRADICTION.format(question=question, first=one, second=two) for one, two in pairs]
    return asker.choose(asked, "AB")[:, 0].reshape(-1, 2).mean(axis=1).tolist()


def overlap(one: str, two: str) -> float:
    """F1 of the words of two texts, as multisets, case ignored; 1 for two texts without words."""
    a, b = Counter(_WORD.findall(one.casefold())), Counter(_WORD.findall(two.casefold()))
    return 2 * (a & b).total() / (a.total() + b.total()) if a or b else 1.0


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()

"""Targets in the model's own words: its own answer where that is right, the row's own answer where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.curate.step import StepContext
from ftpipe.curate.synthesize._questions import Message, Question, questions
from ftpipe.curate.synthesize.base import Synthesizer
from ftpipe.data.rows import HELDOUT, RowSet, content_id
from ftpipe.evaluate.checkers.base import Case
from ftpipe.evaluate.checkers.judge import Judge
from ftpipe.models.answers import Answerer
from ftpipe.slots import choose

SELF, PARAPHRASE, GOLD = "self", "paraphrase", "gold"
GENERATIONS = "generations.parquet"
REASONS = {SELF: "answered by the model itself", PARAPHRASE: "answer restated by the model"}
EXAMPLES = 5


class SelfAnswers(Synthesizer):
    """Puts answers of the base model, decoded greedily, in the place of rows' answers where a checker accepts them.

    A row that is replaced is dropped, and a new one with the same conversation stands where it stood; rows that are no conversation ending with an answer
    stay. An answer that did not end by itself, or that makes a row what a held-out row is, is not accepted. Every row gets the annotation `target`: self,
    paraphrase or gold; new rows have it in their meta. `generations.parquet` holds all that was generated, with the checker's verdict.
    """

    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "peft")

    checker: choose("evaluate/checkers") = Field(  # type: ignore[valid-type]
        default=Judge(), description="What says that an answer is as good as the row's; a judge is the base model.")
    max_new_tokens: int = Field(default=256, ge=1, description="Longest answer, in tokens.")

    def restated(self, question: Question) -> list[Message] | None:
        """The conversation in which the model is asked to say the row's answer in its own words; None to leave it as it is."""
        return None

    def make(self, rows: RowSet, ctx: StepContext) -> Iterator[dict[str, Any]]:
        asked = questions(rows)
        target = {q.row_id: (GOLD, q.gold) for q in asked}
        secret = set(rows.table(HELDOUT, ["content_id"])["content_id"].to_pylist())
        log: list[tuple[str, str, str, bool]] = []
        with Answerer(ctx, model=ctx.model) as model:
            for tag, conversation in ((SELF, lambda q: q.asked), (PARAPHRASE, self.restated)):
                left = [(q, turns) for q in asked if target[q.row_id][0] == GOLD and (turns := conversation(q))]
                answers = [a for a, in model.answers([turns for _, turns in left], max_new_tokens=self.max_new_tokens)] if left else []
                # what a held-out row says must not come back as a train row
                usable = [(q, a.text) for (q, _), a in zip(left, answers) if a.usable and content_id(_row(q, a.text)) not in secret]
                verdicts = self.checker.check([Case(q.asked, text, q.gold) for q, text in usable], model.greedy)
                accepted = {q.row_id: (tag, text) for (q, text), yes in zip(usable, verdicts) if yes}
                target |= accepted
                log += [(q.row_id, tag, a.text, q.row_id in accepted) for (q, _), a in zip(left, answers)]
        self._write(asked, target, log, rows, ctx)
        for q in asked:
            tag, text = target[q.row_id]
            if text != q.gold:
                yield _row(q, text) | {"replaces": q.row_id, "reason": REASONS[tag], "parents": [q.row_id], "meta": {"target": tag}}

    def _write(self, asked: list[Question], target: dict[str, tuple[str, str]], log: list[tuple[str, str, str, bool]], rows: RowSet, ctx: StepContext) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = {"row_id": pa.string(), "stage": pa.string(), "answer": pa.string(), "accepted": pa.bool_()}
        columns = zip(*log) if log else [[] for _ in names]
        pq.write_table(pa.table({n: pa.array(list(c), t) for (n, t), c in zip(names.items(), columns)}), ctx.out / GENERATIONS, compression="zstd")
        ids = sorted(rows.ids())
        tags = [target[i][0] if i in target else GOLD for i in ids]
        ctx.annotate(pa.table({"row_id": pa.array(ids, pa.string()), "target": pa.array(tags, pa.string())}))
        counts = Counter(tags)
        shown = [q for q in asked if target[q.row_id][0] != GOLD][:EXAMPLES]
        ctx.report({"rows": len(ids), "asked": len(asked), "targets": {t: counts[t] for t in (SELF, PARAPHRASE, GOLD)},
                    "shares": {t: counts[t] / len(ids) for t in (SELF, PARAPHRASE, GOLD)} if ids else {},
                    "examples": [{"question": q.asked[-1]["content"], "gold": q.gold, "target": target[q.row_id][1], "tag": target[q.row_id][0]}
                                 for q in shown]})


def _row(question: Question, text: str) -> dict[str, Any]:
    return {"format": "messages", "messages": question.answered(text)}

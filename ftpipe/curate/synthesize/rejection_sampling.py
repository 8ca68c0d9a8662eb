"""Rejection sampling: further answers by a model, those that are right and differ in how they get there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from ftpipe.curate.step import StepContext
from ftpipe.curate.synthesize._paths import distinct
from ftpipe.curate.synthesize._questions import Question, questions
from ftpipe.curate.synthesize.base import Synthesizer
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError
from ftpipe.evaluate.checkers._arithmetic import annotations
from ftpipe.evaluate.checkers.base import Case
from ftpipe.evaluate.checkers.final_number import FinalNumber
from ftpipe.models.answers import Answer, Answerer
from ftpipe.slots import choose
from ftpipe.stages.base import Ref

GENERATIONS = "generations.parquet"
KEPT, UNUSABLE, WRONG, REPEATED = "kept", "unfinished or empty", "wrong", "the path of another"


@dataclass
class Sample:
    """One answer drawn for a question: by which sampler, as its which sample, and what became of it."""

    question: Question
    sampler: str
    number: int
    answer: Answer
    verdict: str = ""


class RejectionSampling(Synthesizer):
    """Adds to each question the answers of models that a checker accepts, one for each different path. The row it started from stays.

    `samples` answers are drawn from each of `samplers`, train stages on these very rows as a rule (the paper's SFT models; several pool their answers), or from
    the base model if none is named. One that did not end by itself is not accepted. By default the final number has to be right, and every annotation
    <<a=b>> (GSM8K). Two answers go the same path if they have the same list of annotations, in order, spaces left out; answers without annotations all go
    one path. Of two on one path the one is kept that is further from the other answers kept so far, by edit distance. The path of the row's own answer
    does not count. The paper then trains the base model, not the sampler, on the result, as it was trained on the rows before.

    `generations.parquet` holds every answer with its verdict; the annotations `sampled`, `correct` and `paths` say how many each row got. Answers are
    cached: another checker or more samples ask for nothing twice.
    """

    paper: ClassVar[str] = "Scaling Relationship on Learning Mathematical Reasoning with Large Language Models"
    uses_model: ClassVar[bool] = True
    uses_seed = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "peft")

    samplers: list[Ref] = Field(default_factory=list, description="Train stages whose adapters answer; the base model itself if none is named.")
    samples: int = Field(default=100, ge=1, description="Answers drawn from each sampler.")
    temperature: float = Field(default=0.7, gt=0, description="Temperature of the samples.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Probability mass of the nucleus they are drawn from.")
    max_new_tokens: int = Field(default=256, ge=1, description="Longest answer, in tokens.")
    checker: choose("evaluate/checkers") = Field(  # type: ignore[valid-type]
        default=FinalNumber(calculations=True), description="What accepts an answer; a judge is the base model.")
    distinct: Literal["equations", "text"] = Field(default="equations", description="What tells paths apart: the list of annotations, or the answer's words.")

    def make(self, rows: RowSet, ctx: StepContext) -> Iterator[dict[str, Any]]:
        asked = questions(rows)
        drawn = self._drawn(asked, ctx)
        self._check(drawn, ctx)
        for samples in drawn:
            right = [s for s in samples if s.verdict == KEPT]
            chosen = distinct([s.answer.text for s in right], [self._path(s.answer.text) for s in right])
            for i, sample in enumerate(right):
                sample.verdict = KEPT if i in chosen else REPEATED
        self._write(asked, drawn, ctx)
        for sample in (s for samples in drawn for s in samples if s.verdict == KEPT):
            meta = {"sampler": sample.sampler, "sample": sample.number}
            yield {"format": "messages", "messages": sample.question.answered(sample.answer.text), "parents": [sample.question.row_id],
                   "meta": meta | ({"equations": self._path(sample.answer.text)} if self.distinct == "equations" else {})}

    def _path(self, text: str) -> str:
        return "|".join(annotations(text)) if self.distinct == "equations" else " ".join(text.split())

    def _drawn(self, asked: list[Question], ctx: StepContext) -> list[list[Sample]]:
        """The samples of each question, sampler after sampler."""
        drawn: list[list[Sample]] = [[] for _ in asked]
        for ref in self.samplers or [None]:
            adapter = ctx.inputs[ref] if ref else None
            if adapter is not None and not adapter.has("adapter"):
                raise ConfigError(f"samplers: {ref} is a {adapter.kind} stage, which makes no adapter", where=ctx.name, remedy="name train stages")
            with Answerer(ctx, model=ctx.model, adapter=adapter) as model:
                answers = model.answers([q.asked for q in asked], max_new_tokens=self.max_new_tokens, samples=self.samples, temperature=self.temperature,
                                        top_p=self.top_p, seed=ctx.seed)
            for into, question, got in zip(drawn, asked, answers):
                into += [Sample(question, ref or "base", number, answer) for number, answer in enumerate(got)]
        return drawn

    def _check(self, drawn: list[list[Sample]], ctx: StepContext) -> None:
        """Set the verdict of each sample: `KEPT` for all right ones. Equal answers to a question are checked once."""
        every = [s for samples in drawn for s in samples]
        cases = {(s.question.row_id, s.answer.text): Case(s.question.asked, s.answer.text, s.question.gold) for s in every if s.answer.usable}
        with Answerer(ctx, model=ctx.model) as judge:
            right = dict(zip(cases, self.checker.check(list(cases.values()), judge.greedy)))
        for sample in every:
            answer = sample.answer
            sample.verdict = answer.problem or (UNUSABLE if not answer.usable else KEPT if right[sample.question.row_id, answer.text] else WRONG)

    def _write(self, asked: list[Question], drawn: list[list[Sample]], ctx: StepContext) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        every = [s for samples in drawn for s in samples]
        pq.write_table(pa.table({
            "row_id": pa.array([s.question.row_id for s in every], pa.string()), "sampler": pa.array([s.sampler for s in every], pa.string()),
            "sample": pa.array([s.number for s in every], pa.int32()), "answer": pa.array([s.answer.text for s in every], pa.string()),
            "verdict": pa.array([s.verdict for s in every], pa.string())}), ctx.out / GENERATIONS, compression="zstd")
        correct = [sum(s.verdict in (KEPT, REPEATED) for s in samples) for samples in drawn]
        paths = [sum(s.verdict == KEPT for s in samples) for samples in drawn]
        ctx.annotate(pa.table({"row_id": pa.array([q.row_id for q in asked], pa.string()), "sampled": pa.array([len(s) for s in drawn], pa.int32()),
                               "correct": pa.array(correct, pa.int32()), "paths": pa.array(paths, pa.int32())}))
        verdicts = Counter(s.verdict for s in every)
        ctx.report({"questions": len(asked), "samplers": self.samplers or ["base"], "sampled": len(every), "verdicts": dict(sorted(verdicts.items())),
                    "solved": sum(c > 0 for c in correct), "paths_per_question": sum(paths) / len(paths) if paths else None})

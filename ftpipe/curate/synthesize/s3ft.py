"""Selective Self-to-Supervised Fine-Tuning: the model's own answer, its restatement of the row's answer, or the row's answer."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from ftpipe.curate.synthesize._questions import Message, Question
from ftpipe.curate.synthesize._self import SelfAnswers
from ftpipe.data.wording import fill


class S3ft(SelfAnswers):
    """The target of a row is the base model's own answer if the checker accepts it; else the model's restatement of the row's answer, if the checker
    accepts that; else the row's answer.

    To restate, the model is shown question and answer; the row it is trained on never shows the answer in the question. As many rows come out as went in,
    with the same questions. Without the second stage this is `ssr`. The paper's checker is a rule (the same final answer, tests that pass) or a language
    model; how it decodes, and the words it asks for a restatement with, are not known to us: here greedily, in words of our own.
    """

    paper: ClassVar[str] = "Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models"

    restate: str = Field(default="{question}\n\nHere is the correct answer:\n{answer}\n\nGive the same answer in your own words.",
                         description="What the model is asked to restate an answer; {question} and {answer} are filled in.")

    @field_validator("restate")
    @classmethod
    def _parts(cls, value: str) -> str:
        for part in ("{question}", "{answer}"):
            if value.count(part) != 1:
                raise ValueError(f"{part} must stand once in it")
        return value

    def restated(self, question: Question) -> list[Message] | None:
        last = question.asked[-1]
        if last["role"] != "user":
            return None
        said = fill(self.restate, {"question": last["content"], "answer": question.gold})
        return [*question.asked[:-1], {"role": "user", "content": said}]

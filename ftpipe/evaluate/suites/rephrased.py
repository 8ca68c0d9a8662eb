"""The same questions under several wordings of the instruction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from ftpipe.evaluate.checkers.base import Message
from ftpipe.evaluate.suites.generation import Generation, reworded

OBSERVED, UNOBSERVED = "observed ", "unobserved "
"""What an item's slice begins with: whether its wording is one that training showed. The wording's number follows."""


class Rephrased(Generation):
    """A generation suite that asks each question once for each wording: with those that training showed, and with others that mean the same.

    An item is a question under a wording, its slice the wording (`observed 1`, `unobserved 3`, numbered as they are written), so that every (system,
    question, wording) has a score of its own in `items.parquet`. The diagnostic `prompt_sensitivity` makes the paper's figures of them: how scores
    spread over wordings, and how far unobserved ones fall behind (sections 3 and 4; the paper's training of soft prompts is not done here). Choose wordings
    that nobody could mistake for another task, and observed ones that the training rows really have.
    """

    paper: ClassVar[str] = "Evaluating the Zero-shot Robustness of Instruction-tuned Language Models"

    observed: list[str] = Field(default=["{question}"], min_length=1, description="Wordings that training showed; {question} is filled in.")
    unobserved: list[str] = Field(
        default=["Please answer this: {question}", "{question}\n\nWhat is the answer?", "Here is a question. {question}\nGive your answer.",
                 "I would like you to respond to the following.\n\n{question}", "Task: {question}\nResponse:"],
        min_length=1, description="Wordings that training did not show.")

    @field_validator("observed", "unobserved")
    @classmethod
    def _wordings(cls, value: list[str]) -> list[str]:
        if any("{question}" not in wording for wording in value):
            raise ValueError("every wording has to hold the {question}")
        return value

    @field_validator("prompt")
    @classmethod
    def _unused(cls, value: str) -> str:
        if value != "{question}":
            raise ValueError("write wordings into `observed` and `unobserved`")
        return value

    def _askings(self, turns: Sequence[Message]) -> Iterator[tuple[str, str, list[Message]]]:
        for kind, wordings in ((OBSERVED, self.observed), (UNOBSERVED, self.unobserved)):
            for number, wording in enumerate(wordings, 1):
                yield f" {kind}{number}", f"{kind}{number}", reworded(turns, wording)

"""A language model as judge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from ftpipe.data.wording import fill
from ftpipe.errors import ConfigError
from ftpipe.evaluate.checkers.base import Ask, Case, Checker
from ftpipe.slots import Pattern


class Judge(Checker):
    """Accepts an answer that a model, shown question, reference and answer, calls right.

    The judge is the model that the caller asks (the step's base model). It answers greedily; `yes` finds whether it agreed. A lenient judge lets wrong
    answers in: look at a sample of what it accepted.
    """

    asks: ClassVar[bool] = True

    prompt: str = Field(default="A question was answered twice. The first answer is known to be correct.\n\nQuestion:\n{question}\n\n"
                        "Correct answer:\n{reference}\n\nOther answer:\n{answer}\n\n"
                        "Does the other answer come to the same as the correct answer? Reply with yes or no only.",
                        description="What the judge is asked; {question}, {reference} and {answer} are filled in.")
    yes: Pattern = Field(default=r"(?i)^\W*yes\b", description="Regular expression that finds agreement in the reply.")
    max_new_tokens: int = Field(default=8, ge=1, description="Longest reply.")

    @field_validator("prompt")
    @classmethod
    def _parts(cls, value: str) -> str:
        if "{answer}" not in value:
            raise ValueError("the judge has to be shown the {answer}")
        return value

    def accepts(self, case: Case) -> bool:
        raise ConfigError("a judge needs a model to ask", remedy="call `check` with one")

    def check(self, cases: Sequence[Case], ask: Ask | None = None) -> list[bool]:
        if ask is None:
            raise ConfigError("a judge needs a model to ask", where="evaluate/checkers/judge", remedy="use a checker by rule here, such as exact")
        replies = ask([[{"role": "user", "content": self._filled(case)}] for case in cases], self.max_new_tokens)
        return [re.search(self.yes, reply) is not None for reply in replies]

    def _filled(self, case: Case) -> str:
        return fill(self.prompt, {"question": "\n".join(turn["content"] for turn in case.question), "reference": case.reference, "answer": case.answer})

"""The base of checkers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ftpipe.slots import Method

Message = dict[str, str]
Ask = Callable[[Sequence[Sequence[Message]], int], list[str]]
"""Puts conversations to a model: their answers, of so many tokens at most, decoded greedily. Whoever checks provides it."""


@dataclass(frozen=True)
class Case:
    """An answer to be checked. question: the conversation before it. reference: an answer that is known to be right."""

    question: Sequence[Message]
    answer: str
    reference: str


class Checker(Method):
    """Says whether an answer is as good as a reference. A subclass writes `accepts`, or `check` if it has to ask a model.

    Class attributes:
        asks: `check` needs a model to ask. needs_reference: False if the answer alone decides.
    """

    slot: ClassVar[str] = "evaluate/checkers"
    asks: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    @abstractmethod
    def accepts(self, case: Case) -> bool:
        """Whether the answer is right. It must be a function of the case alone, and must not raise for any text."""

    def check(self, cases: Sequence[Case], ask: Ask | None = None) -> list[bool]:
        """The verdict on each case. ask: the model that judges; only a checker that needs one uses it."""
        return [self.accepts(case) for case in cases]

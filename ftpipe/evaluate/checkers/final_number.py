"""The same final number, and calculations that are right."""

from __future__ import annotations

import math
import re
from typing import ClassVar

from pydantic import Field

from ftpipe.evaluate.checkers._arithmetic import annotations, correct
from ftpipe.evaluate.checkers.base import Case, Checker

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)")


class FinalNumber(Checker):
    """Accepts an answer whose final number is the reference's, as in GSM8K, where it follows `#### `.

    The final number is the first one after the last marker; commas and signs of money do not count. With `calculations` each of the answer's calculator
    annotations (`<<48/2=24>>`) has to be right too: what stands before the first equals sign evaluates to what stands after it, within `tolerance`.
    """

    support: ClassVar[tuple[str, ...]] = ("ftpipe.evaluate.checkers._arithmetic",)

    marker: str = Field(default="####", description="What stands before the final number; empty: the last number of the text is final.")
    anywhere: bool = Field(default=False, description="Of an answer without the marker the last number counts; else it is not accepted.")
    tolerance: float = Field(default=1e-3, ge=0, description="Largest difference of two sides of a calculation; final numbers must be equal.")
    calculations: bool = Field(default=False, description="Every annotation <<a=b>> must be right.")

    def accepts(self, case: Case) -> bool:
        said, right = self.final(case.answer), self.final(case.reference, anywhere=True)
        if said is None or right is None or said != right:
            return False
        return not self.calculations or all(correct(a, self.tolerance) for a in annotations(case.answer))

    def final(self, text: str, *, anywhere: bool | None = None) -> float | None:
        """The final number of a text, None if it has none."""
        if self.marker and self.marker in text:
            found = NUMBER.search(text.rpartition(self.marker)[2])
        elif (self.anywhere if anywhere is None else anywhere) or not self.marker:
            found = next(iter(list(NUMBER.finditer(text))[-1:]), None)
        else:
            found = None
        value = float(found[0].replace(",", "")) if found else math.nan
        return value if math.isfinite(value) else None

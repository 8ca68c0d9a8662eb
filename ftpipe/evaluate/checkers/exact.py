"""The same text."""

from __future__ import annotations

from pydantic import Field

from ftpipe.evaluate.checkers.base import Case, Checker


class Exact(Checker):
    """Accepts an answer that says the reference word for word."""

    ignore_case: bool = Field(default=False, description="Upper and lower case are the same.")
    ignore_whitespace: bool = Field(default=True, description="Any run of white space is one space, and none counts at the ends.")

    def accepts(self, case: Case) -> bool:
        return self._plain(case.answer) == self._plain(case.reference)

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()) if self.ignore_whitespace else text
        return text.casefold() if self.ignore_case else text

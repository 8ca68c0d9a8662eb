"""What a pattern finds in both answers is the same."""

from __future__ import annotations

import re

from pydantic import Field

from ftpipe.evaluate.checkers.base import Case, Checker
from ftpipe.slots import Pattern


class Regex(Checker):
    """Accepts an answer in which a pattern finds what it finds in the reference: its first group, or all it matches where it has none.

    The last match of a text counts. A pattern that is not in the reference accepts nothing; without `compare` it only has to be in the answer.
    """

    pattern: Pattern = Field(min_length=1, description="Regular expression, such as `answer is ([A-E])`. Dots match line feeds too.")
    ignore_case: bool = Field(default=False, description="Upper and lower case are the same.")
    compare: bool = Field(default=True, description="What it finds must be the same in the reference; false: it must be in the answer.")

    def accepts(self, case: Case) -> bool:
        said = self._found(case.answer)
        return said is not None and (not self.compare or said == self._found(case.reference))

    def _found(self, text: str) -> str | None:
        found = None
        for match in re.finditer(self.pattern, text, re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)):
            found = match[1] if match.re.groups else match[0]
        return found.strip().casefold() if found is not None and self.ignore_case else found.strip() if found is not None else None

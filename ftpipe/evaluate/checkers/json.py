"""The same JSON value."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import Field

from ftpipe.evaluate.checkers.base import Case, Checker

FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


class Json(Checker):
    """Accepts an answer that is the reference's JSON value: spaces, the order of keys and 1 against 1.0 do not count, the order of lists does.

    The value is the whole text, or what stands in its only block of ```. A reference that is no JSON accepts nothing.
    """

    keys: list[str] = Field(default_factory=list, description="Keys of the object that count; all if not set.")

    def accepts(self, case: Case) -> bool:
        said, right = self._value(case.answer), self._value(case.reference)
        return said is not NOTHING and right is not NOTHING and _same(said, right)

    def _value(self, text: str) -> Any:
        blocks = FENCE.findall(text)
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else text)
        except (ValueError, RecursionError):
            return NOTHING
        if self.keys:
            return {k: value[k] for k in self.keys} if isinstance(value, dict) and all(k in value for k in self.keys) else NOTHING
        return value


NOTHING = object()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):  # Python holds true and 1 for equal
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b

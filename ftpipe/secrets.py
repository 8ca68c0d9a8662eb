"""Secrets come from the environment and stay out of everything that ftpipe writes: artifacts, run records, logs, errors."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 8
"""Values of fewer characters are not looked for: they stand in too many words."""
_IN_URL = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://[^\s/:@?#'"]*):([^\s/@'"]+)@""")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_NAME = re.compile(r"(?:^|_)(?:PASSWORD|PASSWD|PASS|SECRET|TOKEN|CREDENTIALS?|AUTH_STRING|KEY)$", re.IGNORECASE)
_filled: set[str] = set()
"""Values that `fill` has put into settings, whatever their variables are called."""


def hide(text: str) -> str:
    """`text` with `***` for every password in a URL and for the value of every environment variable that is named like a secret."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    return _IN_URL.sub(rf"\1:{HIDDEN}@", text) if "://" in text else text


def hidden(value: Any) -> Any:
    """A copy of JSON-like data with `hide` applied to every string in it."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {k: hidden(v) for k, v in value.items()}
    return [hidden(v) for v in value] if isinstance(value, (list, tuple)) else value


def clean(error: BaseException) -> None:
    """Apply `hide` to what an exception says, and to what it was raised from: others print it."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        found = queue.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        found.args = tuple(hide(a) if isinstance(a, str) else a for a in found.args)
        for name in ("message", "strerror", "filename"):
            text = getattr(found, name, None)
            if isinstance(text, str) and hide(text) != text:
                with suppress(AttributeError, TypeError):  # one that cannot be set is better shown than another error in its place
                    setattr(found, name, hide(text))
        queue += [found.__cause__, found.__context__, *(a for a in found.args if isinstance(a, BaseException))]


def fill(text: str) -> str:
    """`text` with the environment's values for `${NAME}`; inside a longer text they are quoted as a URL needs it. Raises KeyError(NAME)."""
    whole = _VARIABLE.fullmatch(text)

    def value(match: re.Match[str]) -> str:
        found = os.environ[match.group(1)]
        if not whole:
            _filled.add(found)
        return found if whole else quote(found, safe="")

    return _VARIABLE.sub(value, text)


def written_out(value: Any, path: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """Where in plain data a URL with a password stands, as keys and numbers; None if nowhere. `${NAME}` in its place is none."""
    if isinstance(value, str):
        return path if any(not _VARIABLE.fullmatch(m.group(2)) for m in _IN_URL.finditer(value)) else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next((found for k, v in items if (found := written_out(v, (*path, k))) is not None), None)


class Formatter(logging.Formatter):
    """Formats a record, traceback included, without the secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


def _values() -> list[str]:
    """What must not be shown, the longest first, as it is and as it stands in a URL."""
    found = {v for k, v in os.environ.items() if _NAME.search(k) and not v.startswith("/")} | _filled
    return sorted({form for v in found if len(v) >= SHORTEST for form in (v, quote(v, safe=""))}, key=lambda v: (-len(v), v))

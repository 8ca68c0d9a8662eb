"""Text from data, made safe to show: no control characters, no direction overrides, a bounded length. Escaping is the template's part."""

from __future__ import annotations

import re
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: Any) -> str:
    """`text` with control characters and direction marks written as `\\x1b` and `\\u202e`: they could hide or reorder what is on the page."""
    text = "" if text is None else str(text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub(lambda m: f"\\x{ord(m.group()):02x}" if ord(m.group()) < 256 else f"\\u{ord(m.group()):04x}", text)
    return _DIRECTION.sub(lambda m: f"\\u{ord(m.group()):04x}", text)


def brief(text: Any, length: int = 300) -> str:
    """Names, reasons and other text that ought to be short, made so."""
    text = clean(text if len(str(text)) <= length else str(text)[:length])
    return text if len(text) < length else text[:length - 1] + "…"


def whole(text: Any) -> Any:
    """Text as markup that is shown in full; for what `clip` has bounded already."""
    from markupsafe import escape

    return escape(clean(text))


def breakable(name: Any) -> Any:
    """A name as markup that may be broken after `/` and `_`."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([/_])", r"\1<wbr>", str(escape(brief(name)))))


def clip(text: Any, length: int) -> dict[str, Any]:
    """The first `length` characters, cleaned, and how many are left out."""
    text = "" if text is None else str(text)
    return {"text": clean(text[:length]), "more": max(len(text) - length, 0)}

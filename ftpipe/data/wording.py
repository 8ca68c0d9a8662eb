"""Wordings with gaps."""

from __future__ import annotations

import re
from collections.abc import Mapping


def fill(wording: str, parts: Mapping[str, str]) -> str:
    """`wording` with each {name} of `parts` replaced by its text. All at once: what a text holds in braces stays as it is."""
    names = "|".join(re.escape(f"{{{name}}}") for name in parts)
    return re.sub(names, lambda match: parts[match[0][1:-1]], wording)

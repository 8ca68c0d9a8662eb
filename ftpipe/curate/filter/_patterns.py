"""Personal data and secrets that can be told by their form: patterns, and the check sums that keep numbers which only look like one from being taken for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Kind:
    """One kind of personal data: what it looks like, and what must hold of a match."""

    pattern: str
    holds: Callable[[str], bool] = lambda found: True

    @property
    def compiled(self) -> re.Pattern[str]:
        return _compiled(self.pattern)


@dataclass(frozen=True)
class Match:
    kind: str
    start: int
    end: int


def luhn(text: str) -> bool:
    """The check sum of card numbers (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in text if c.isdigit()]
    total = sum(d if i % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(reversed(digits)))
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and total % 10 == 0


def iban(text: str) -> bool:
    """The check sum of international bank account numbers (ISO 13616): the number, rearranged, is 1 modulo 97."""
    joined = re.sub(r"\s", "", text).upper()
    return 15 <= len(joined) <= 34 and int("".join(str(int(c, 36)) for c in joined[4:] + joined[:4])) % 97 == 1


def address(text: str) -> bool:
    """An IP address that belongs to somebody: not of a private, local, reserved or documentation network."""
    from ipaddress import ip_address

    try:
        return ip_address(text).is_global
    except ValueError:
        return False


def telephone(text: str) -> bool:
    """As many digits as a telephone number has (ITU-T E.164: 15 at most), and not the same one again and again."""
    digits = [c for c in text if c.isdigit()]
    return 9 <= len(digits) <= 15 and len(set(digits)) > 2


KINDS: dict[str, Kind] = {
    "private_key": Kind(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\S]*?(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----|\Z)"),
    "api_key": Kind(r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{60,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}"
                    r"|hf_[A-Za-z0-9]{30,}|sk-(?:ant-|proj-)?[A-Za-z0-9_-]{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"),
    "email": Kind(r"\b[A-Za-z0-9][\w.+-]*@(?!(?:[\w-]+\.)*example\.(?:com|org|net)\b)(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"),
    "iban": Kind(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", iban),
    "card": Kind(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-]|\.\d)", luhn),
    "ip_address": Kind(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)|(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![\w:])", address),
    "telephone": Kind(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
                      r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])", telephone),
    "social_security": Kind(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"),
}
"""In the order in which they are looked for: a place that one kind has taken is not taken for another."""


def matches(text: str, kinds: tuple[str, ...]) -> list[Match]:
    """Every match in a text, by place; no two overlap."""
    found: list[Match] = []
    for kind in KINDS:
        if kind in kinds:
            found += [m for m in _of(text, kind) if not any(m.start < f.end and f.start < m.end for f in found)]
    return sorted(found, key=lambda m: m.start)


def redact(text: str, kinds: tuple[str, ...]) -> str:
    """The text with each match replaced by the name of its kind: `[EMAIL]`."""
    parts, at = [], 0
    for match in matches(text, kinds):
        parts += [text[at:match.start], f"[{match.kind.upper()}]"]
        at = match.end
    return "".join([*parts, text[at:]])


def _of(text: str, kind: str) -> Iterator[Match]:
    for found in KINDS[kind].compiled.finditer(text):
        if KINDS[kind].holds(found.group()):
            yield Match(kind, found.start(), found.end())


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)

"""How numbers are written in reports: one place for digits, signs and units."""

from __future__ import annotations

import math
from typing import Any

NONE = "–"
MINUS = "\N{MINUS SIGN}"
NARROW = "\N{NARROW NO-BREAK SPACE}"


def count(value: float | None) -> str:
    """A whole number with thousands separated: `12,345`."""
    return NONE if _absent(value) else f"{round(value):,}".replace("-", MINUS)


def number(value: float | None, digits: int | None = None, *, sign: bool = False) -> str:
    """A measured number. Without `digits`: three significant ones, at most four decimals, powers of ten outside 1e-4 to 1e6."""
    if _absent(value):
        return NONE
    if isinstance(value, int) and digits is None and not sign:
        return count(value)
    size = abs(value)
    if digits is None and size and (size < 1e-4 or size >= 1e6):
        text = _power(value)
    else:
        text = f"{value:,.{_digits(value) if digits is None else digits}f}"
        if float(text.replace(",", "")) == 0:
            text = text.lstrip("-")
    if sign and not text.startswith("-") and text.strip("0.,"):
        text = "+" + text
    return text.replace("-", MINUS, 1)


def digits_for(*values: float | None) -> int:
    """How many decimals a group of numbers needs so that the smallest interval among them still shows two significant digits."""
    sizes = [abs(v) for v in values if not _absent(v) and v]
    return min(max((2 - math.floor(math.log10(min(sizes))) - 1 if sizes else 2), 1), 4) if sizes else 2


def interval(low: float | None, high: float | None, digits: int | None = None, *, sign: bool = False) -> str:
    """An interval: `0.48 to 0.68`. A side that is None is unbounded."""
    if _absent(low) and _absent(high):
        return "unbounded"
    below = f"{MINUS}∞" if _absent(low) else number(low, digits, sign=sign)
    return f"{below} to {'∞' if _absent(high) else number(high, digits, sign=sign)}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share between 0 and 1 as per cent; never rounds a real share to 0 or 100."""
    if _absent(share):
        return NONE
    value = 100 * share
    text = f"{value:.{digits}f}"
    if value > 0 and not float(text):
        return f"<{NARROW}{10 ** -digits:.{digits}f}{NARROW}%"
    if value < 100 and float(text) == 100:
        return f">{NARROW}{100 - 10 ** -digits:.{digits}f}{NARROW}%"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{NARROW}%"


def seconds(value: float | None) -> str:
    """A duration: `0.4 s`, `38 s`, `3 min 20 s`, `2 h 05 min`."""
    if _absent(value):
        return NONE
    if 0 < value < 0.05:
        return f"<{NARROW}0.1{NARROW}s"
    if value < 10:
        return f"{value:.1f}{NARROW}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}{NARROW}s"
    if whole < 3600:
        return f"{whole // 60}{NARROW}min {whole % 60:02d}{NARROW}s"
    return f"{whole // 3600}{NARROW}h {whole % 3600 // 60:02d}{NARROW}min"


def size(value: float | None) -> str:
    """Bytes: `812 B`, `4.2 MB`."""
    if _absent(value):
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f}{NARROW}{unit}" if unit == "B" or value >= 100 else f"{value:.1f}{NARROW}{unit}"
        value /= 1000
    return f"{value:.1f}{NARROW}TB"


def setting(value: Any) -> str:
    """A setting as a user would write it in YAML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(setting(v) for v in value) or "none"
    return str(value)


def short_key(key: str) -> str:
    """The first digits of a hash, enough to recognise it and to look it up."""
    return key[:10]


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _digits(value: float) -> int:
    return 2 if not value else min(max(2 - math.floor(math.log10(abs(value))), 0), 4)


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"

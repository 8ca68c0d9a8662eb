"""The label audit: what of each row is trained on, shown on a row."""

from __future__ import annotations

from typing import Any

from ftpipe.report.collect import RunData
from ftpipe.report.numbers import count, percent
from ftpipe.report.text import clean

FILE, LENGTH = "audit.json", 3000
SPLITS = {"train": ("Rows for training", "trained on"), "heldout": ("Held-out rows", "scored")}


def build(run: RunData) -> dict[str, Any] | None:
    found = run.having(FILE)
    stated = found[0].json(FILE) if found else None
    if not isinstance(stated, dict):
        return None
    return {"step": found[0].name, "splits": _splits(stated), "reasons": _reasons(stated), "warnings": [str(w) for w in stated.get("warnings") or []],
            "ends": _ends(stated), "rows": count(stated.get("rows")), "passed": count(stated.get("passed")), "example": _example(stated)}


def _splits(stated: dict[str, Any]) -> list[dict[str, str]]:
    """For each side of the split, how many of its tokens are trained on."""
    found = stated.get("splits") if isinstance(stated.get("splits"), dict) else {}
    return [{"name": SPLITS.get(name, (name, ""))[0], "verb": SPLITS.get(name, ("", "trained on"))[1], "percent": percent(s["trained_share"]),
             "width": f"{100 * s['trained_share']:.2f}", "tokens": count(s.get("tokens"))} for name, s in found.items() if s.get("trained_share") is not None]


def _reasons(stated: dict[str, Any]) -> list[dict[str, str]]:
    """Each way in which rows failed, with the first row that did."""
    found = stated.get("reasons") if isinstance(stated.get("reasons"), dict) else {}
    return [{"reason": reason, "rows": count(r.get("rows")), "row_id": str(r.get("row_id") or ""), "origin": str(r.get("origin") or "")}
            for reason, r in found.items()]


def _ends(stated: dict[str, Any]) -> list[tuple[str, str]]:
    """The tokens that answers end with, as trained."""
    return [(token, count(n)) for token, n in (stated.get("end_tokens") or {}).items()]


def _example(stated: dict[str, Any]) -> dict[str, Any] | None:
    """One rendered row: its parts with text and whether they are trained on, cut after `LENGTH` characters."""
    example = stated.get("example")
    if not isinstance(example, dict) or not example.get("parts"):
        return None
    parts, left = [], LENGTH
    for part in example["parts"]:
        if left > 0:
            parts.append({"text": clean(part["text"][:left]), "trained": bool(part["trained"])})
        left -= len(part["text"])
    return {"row_id": str(example.get("row_id") or ""), "origin": str(example.get("origin") or ""), "parts": parts, "more": max(-left, 0)}

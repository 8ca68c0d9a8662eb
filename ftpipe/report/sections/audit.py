"""The label audit: what of each row is trained on, shown on a row."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.collect import RunData, table
from ftpipe.report.numbers import count, percent, setting
from ftpipe.report.text import clean

FILE, LENGTH = "audit.json", 3000


def build(run: RunData) -> dict[str, Any] | None:
    found = run.having(FILE)
    if not found:
        return None
    artifact = found[0]
    stated = artifact.json(FILE)
    stated = stated if isinstance(stated, dict) else {}
    return {"step": artifact.name, "share": _share(artifact, stated), "checks": _checks(stated), "facts": _facts(stated), "example": _example(stated)}


def _share(artifact: Artifact, stated: dict[str, Any]) -> dict[str, str] | None:
    """Share of all tokens that is trained on, from the counts of the rows; else as stated."""
    if artifact.has("annotations.parquet"):
        read = table(artifact, "annotations.parquet", ("tokens", "trained_tokens")).to_pydict()
        if len(read) == 2 and sum(read["tokens"]):
            trained, total = sum(read["trained_tokens"]), sum(read["tokens"])
            return {"percent": percent(trained / total), "width": f"{100 * trained / total:.2f}", "trained": count(trained), "total": count(total)}
    share = stated.get("trained_share")
    return {"percent": percent(share), "width": f"{100 * share:.2f}", "trained": "", "total": ""} if isinstance(share, float) else None


def _checks(stated: dict[str, Any]) -> list[dict[str, Any]]:
    """Each check with the rows that failed it."""
    checks = stated.get("checks")
    if not isinstance(checks, dict):
        return []
    return [{"name": name.replace("_", " "), "failed": n if isinstance(n, int) else 0, "value": count(n) if isinstance(n, int) else setting(n)}
            for name, n in checks.items() if isinstance(n, (int, float, str))]


def _facts(stated: dict[str, Any]) -> list[tuple[str, str]]:
    return [(k.replace("_", " "), count(v) if isinstance(v, int) else setting(v)) for k, v in stated.items()
            if isinstance(v, (int, str)) and not isinstance(v, bool) and len(str(v)) < 80]


def _example(stated: dict[str, Any]) -> dict[str, Any] | None:
    """One rendered row as `{row_id, segments: [{text, trained}]}`, cut after `LENGTH` characters."""
    example = stated.get("example") or next(iter(stated.get("examples") or []), None)
    if not isinstance(example, dict) or not isinstance(example.get("segments"), list):
        return None
    segments, left = [], LENGTH
    for s in example["segments"]:
        if left <= 0:
            break
        segments.append({"text": clean(s["text"][:left]), "trained": bool(s["trained"])})
        left -= len(s["text"])
    total = sum(len(s["text"]) for s in example["segments"])
    return {"row_id": example.get("row_id"), "segments": segments, "more": max(total - LENGTH, 0)}

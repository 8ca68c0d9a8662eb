"""The funnel: what became of every row that was read."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.collect import RunData, columns, rows_of
from ftpipe.report.funnel import funnel
from ftpipe.report.numbers import count, percent

REASONS = 6


def build(run: RunData) -> dict[str, Any] | None:
    path = [*run.path, *([run.adapter] if run.adapter and run.adapter not in run.path else [])]
    steps = funnel(path)
    if not steps:
        return None
    widest = max(s["rows_in"] for s in steps) or 1
    names = {a.name for a in run.path}
    others = []
    for system, training in run.controls.items():
        own = [a for a in (*rows_of(training), training) if a.name not in names]
        if funnel(own):
            others.append({"system": system, "steps": _bars(funnel(own), widest), "end": _end(training)})
    return {"steps": _bars(_with_gaps(path, steps), widest), "end": _end(run.adapter), "others": others, "quarantine": _quarantine(run.path)}


def _with_gaps(path: list[Artifact], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps, and between them the rows that left without a decision because they are held out."""
    heldout = {a.name: _heldout(a) for a in path}
    result = []
    for step, following in zip(steps, [*steps[1:], None]):
        result.append(step)
        gap = step["rows_kept"] - following["rows_in"] if following else 0
        if gap > 0:
            held = gap == heldout[step["step"]]
            result.append({"step": None, "rows": gap, "why": "held out for evaluation, never trained on" if held else "not passed to the next step"})
    return result


def _heldout(artifact: Artifact) -> int:
    """Held-out rows that the artifact passes on."""
    file = next((f for f in ("kept.parquet", "rows.parquet") if artifact.has(f)), None)
    return columns(artifact, file, "split")[0].count("heldout") if file else 0


def _bars(steps: list[dict[str, Any]], widest: int) -> list[dict[str, Any]]:
    bars = []
    for s in steps:
        if s["step"] is None:
            bars.append({"gap": count(s["rows"]), "why": s["why"]})
            continue
        reasons = list(s["dropped"].items())
        shown = [{"reason": r, "rows": count(n)} for r, n in reasons[:REASONS]]
        rest = sum(n for _, n in reasons[REASONS:])
        if rest:
            shown.append({"reason": f"{len(reasons) - REASONS} further reasons", "rows": count(rest)})
        bars.append({"step": s["step"], "rows_in": count(s["rows_in"]), "rows_kept": count(s["rows_kept"]), "reasons": shown, "gap": None,
                     "kept_width": f"{100 * s['rows_kept'] / widest:.2f}", "dropped_width": f"{100 * (s['rows_in'] - s['rows_kept']) / widest:.2f}",
                     "share": percent(s["rows_kept"] / s["rows_in"]) if s["rows_in"] else ""})
    return bars


def _end(training: Artifact | None) -> dict[str, str] | None:
    """Rows and presentations of the training that the funnel leads to."""
    if training is None or not training.has("seen.parquet"):
        return None
    (times,) = columns(training, "seen.parquet", "times")
    return {"stage": training.name, "rows": count(sum(1 for t in times if t)), "times": count(sum(times))}


def _quarantine(path: list[Artifact]) -> list[dict[str, Any]]:
    """A few of the rows that could not be read, with file, line and reason."""
    for artifact in path:
        if artifact.has("quarantine.parquet"):
            source, line, reason, raw = columns(artifact, "quarantine.parquet", "source", "line", "reason", "raw")
            return [{"source": s, "line": n, "reason": r, "raw": (t or "")[:160]} for s, n, r, t in list(zip(source, line, reason, raw))[:5]]
    return []

"""The adapter against everything it was compared with, and the rules of the gate."""

from __future__ import annotations

from typing import Any

from ftpipe.report.collect import RunData
from ftpipe.report.numbers import count, interval, number, percent
from ftpipe.report.plots.forest import forest
from ftpipe.report.summary import ADAPTER, BASE, CHAMPION, row_digits, unit

TONE = {"better": "good", "worse": "bad"}


def build(run: RunData) -> dict[str, Any] | None:
    found = run.summary
    if not found["rows"] and not found["verdict"]:
        return None
    return {"suites": [_suite(row, found["systems"], run) for row in found["rows"]], "forests": _forests(found["rows"], run),
            "rules": [_rule(r) for r in (found["verdict"] or {}).get("rules", [])], "verdict": found["verdict"], "line": found["line"]}


def role_name(system: str, run: RunData) -> str:
    """What a system is, in words."""
    if system in run.controls:
        return f"{system} (control)"
    return {BASE: "base model", ADAPTER: "adapter", CHAMPION: "champion so far"}.get(system, system)


def _suite(row: dict[str, Any], systems: list[str], run: RunData) -> dict[str, Any]:
    digits = row_digits(row)
    lines = []
    for system in systems:
        if system not in row["means"]:
            continue
        c = row["against"].get(system)
        lines.append({"system": role_name(system, run), "adapter": system == ADAPTER, "mean": number(row["means"][system], digits),
                      "difference": number(c["difference"], digits, sign=True) if c else "",
                      "interval": interval(c["low"], c["high"], digits, sign=True) if c else "", "words": c["words"] if c else "",
                      "tone": TONE.get(c["words"], "none") if c else "",
                      "mde": number(c["mde"], digits) if c and c.get("mde") and c["words"] not in TONE else ""})
    confidence = next((c["confidence"] for c in row["against"].values() if c.get("confidence")), None)
    return {"suite": row["suite"], "metric": row["metric"], "unit": unit(row["metric"]), "n": count(row["n"]), "forgetting": row["forgetting"], "lines": lines,
            "direction": "higher is better" if row["higher_is_better"] else "lower is better", "confidence": percent(confidence, 0) if confidence else ""}


def _forests(rows: list[dict[str, Any]], run: RunData) -> list[Any]:
    """One plot for each metric, so that an axis never mixes units."""
    plots = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        entries = [{"label": _clip(f"{row['suite']}: against {role_name(other, run)}"), "difference": c["difference"], "low": c["low"], "high": c["high"],
                    "colour": {"better": "good", "worse": "bad"}.get(c["words"], "muted")}
                   for row in rows if row["metric"] == metric for other, c in row["against"].items()]
        if entries:
            plots.append(forest(entries, f"forest{len(plots)}", f"Differences in {metric} with their intervals", f"better by ({unit(metric) or metric})"))
    return plots


def _clip(text: str) -> str:
    return text if len(text) <= 44 else text[:43] + "…"


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    digits = 3
    return {"name": rule["name"], "text": rule.get("text") or "", "passed": rule["passed"], "required": rule.get("required", True),
            "value": number(rule.get("value"), digits, sign=True), "interval": interval(rule.get("low"), rule.get("high"), digits, sign=True),
            "limit": number(rule.get("limit"), digits, sign=True) if rule.get("limit") is not None else ""}

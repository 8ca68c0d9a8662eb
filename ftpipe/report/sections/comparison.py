"""The adapter against everything it was compared with, and the rules of the gate."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from ftpipe.report.collect import RunData, table
from ftpipe.report.numbers import count, digits_for, interval, number, percent, setting
from ftpipe.report.plots.forest import forest
from ftpipe.report.summary import ADAPTER, BASE, CHAMPION, row_digits, unit
from ftpipe.report.text import brief

TONE = {"better": "good", "worse": "bad"}
SLICES = "diagnostics/slices.parquet"
ENDS = 5


def build(run: RunData) -> dict[str, Any] | None:
    found = run.summary
    if not found["rows"] and not found["verdict"]:
        return None
    return {"suites": [_suite(row, found["systems"], run) for row in found["rows"]], "forests": _forests(found["rows"], run),
            "rules": [_rule(r) for r in (found["verdict"] or {}).get("rules", [])], "line": found["line"], "groups": _groups(run), "drawings": _drawings(run)}


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
        entries = [{"label": brief(f"{row['suite']}: against {role_name(other, run)}", 44), "difference": c["difference"], "low": c["low"], "high": c["high"],
                    "colour": {"better": "good", "worse": "bad"}.get(c["words"], "muted")}
                   for row in rows if row["metric"] == metric for other, c in row["against"].items()]
        if entries:
            plots.append(forest(entries, f"forest{len(plots)}", f"Differences in {metric} with their intervals", f"better by ({unit(metric) or metric})"))
    return plots


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    """One rule with its numbers; `state` is passed, failed or skipped."""
    digits = digits_for((rule["high"] - rule["low"]) / 2) if None not in (rule.get("low"), rule.get("high")) else 3
    required = rule.get("required", True)
    state = {True: "passed" if required else "met", False: "failed" if required else "not met", None: "skipped"}[rule["passed"]]
    text, measured = rule.get("text") or "", ""
    if rule.get("require") and rule.get("value") is not None:
        text = _asked(rule)
    if rule.get("value") is not None:
        measured = f"Measured: {number(rule['value'], digits, sign=True)}, interval {interval(rule.get('low'), rule.get('high'), digits, sign=True)}."
    return {"name": rule["name"], "text": text, "measured": measured, "state": state, "required": required,
            "tone": "good" if rule["passed"] else "bad" if state == "failed" else "none"}


def _asked(rule: dict[str, Any]) -> str:
    """What a rule asks for, in words."""
    who = f"the {rule['against']}" if rule["against"] in (BASE, CHAMPION) else rule["against"]
    limit = setting(abs(rule["limit"])) if rule.get("limit") else ""
    if rule["require"] == "better":
        asked = f"better than {who}" + (f" by more than {limit}" if limit else "")
    else:
        asked = f"worse than {who} by no more than {limit}" if limit else f"no worse than {who}"
    return f"On {rule['suite']}: {asked}, over the whole interval."


def _groups(run: RunData) -> list[dict[str, Any]]:
    """Where the adapter gained and lost most, group by group, from the evaluation's `slices` diagnostic; no intervals, so a hint and no finding."""
    if run.evaluation is None or not run.evaluation.has(SLICES):
        return []
    by_suite: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in table(run.evaluation, SLICES).to_pylist():
        by_suite.setdefault((line["suite"], line["metric"]), []).append(line)
    found = []
    for (suite, metric), lines in by_suite.items():
        if len(lines) < 2:
            continue
        lines.sort(key=lambda line: (-line["difference"], line["slice"]))
        ends = lines if len(lines) <= 2 * ENDS else [*lines[:ENDS], *lines[-ENDS:]]
        most, least = max(0.0, ends[0]["difference"]), min(0.0, ends[-1]["difference"])
        span = (most - least) or 1.0
        found.append({"suite": suite, "metric": metric, "n": count(len(lines)), "worse": count(sum(line["difference"] < 0 for line in lines)),
                      "cut": len(lines) > len(ends), "lines": [_group_line(line, least, span) for line in ends]})
    return found


def _group_line(line: dict[str, Any], least: float, span: float) -> dict[str, Any]:
    """A bar from zero, in per cent of the width."""
    value = line["difference"]
    return {"slice": brief(line["slice"] or "(none)", 60), "n": count(line["n"]), "value": number(value, 2, sign=True), "up": value >= 0,
            "left": f"{100 * (min(value, 0.0) - least) / span:.1f}", "width": f"{100 * abs(value) / span:.1f}"}


def _drawings(run: RunData) -> list[dict[str, str]]:
    """Plots of the evaluation's diagnostics. They go in as images, so that nothing inside them can run or reach out."""
    if run.evaluation is None:
        return []
    names = sorted(n for n in run.evaluation.manifest["files"] if n.startswith("diagnostics/") and n.endswith(".svg"))
    return [{"name": n.removeprefix("diagnostics/").removesuffix(".svg").replace("_", " "),
             "source": "data:image/svg+xml;base64," + b64encode(run.evaluation.file(n).read_bytes()).decode()} for n in names]

"""The adapter against everything it was compared with, and the rules of the gate."""

from __future__ import annotations

from typing import Any

from ftpipe.evaluate.slicing import OF
from ftpipe.report.collect import RunData
from ftpipe.report.numbers import count, digits_for, interval, number, percent, setting
from ftpipe.report.plots.forest import forest
from ftpipe.report.summary import ADAPTER, BASE, CHAMPION, in_order, row_digits, unit
from ftpipe.report.text import brief

TONE = {"better": "good", "worse": "bad"}


def build(run: RunData) -> dict[str, Any] | None:
    found = run.summary
    if not found["rows"] and not found["verdict"]:
        return None
    return {"suites": [_suite(row, found["systems"], run) for row in found["rows"]], "forests": _forests(found["rows"], run),
            "rules": [_rule(r) for r in (found["verdict"] or {}).get("rules", [])], "line": found["line"],
            "noise": bool(run.about.get("noise")), "speed": _speed(run)}


def role_name(system: str, run: RunData) -> str:
    """What a system is, in words."""
    if system in run.about.get("replicates", []):
        return f"{system} (another seed)"
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
            "direction": "higher is better" if row["higher_is_better"] else "lower is better", "confidence": percent(confidence, 0) if confidence else "",
            "noise": noise_words(run.about.get("noise", []), row["suite"], row["metric"])}


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
    if rule.get("floor") is not None:
        measured += f" Noise floor of seeds: {number(rule['floor'], digits)}."
    if rule.get("mde"):
        measured += f" A true difference of {number(rule['mde'], digits)} would have shown four times in five."
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
    where = f"On {rule['suite']}" + (f", {OF[rule['by']]} {rule['part']}" if rule.get("part") else "")
    return f"{where}: {asked}, over the whole interval."


def noise_words(noises: list[dict[str, Any]], suite: str, metric: str) -> str:
    """The noise floor of seeds of a suite and metric, as far as one is known."""
    n = next((n for n in noises if (n["suite"], n["metric"]) == (suite, metric)), None)
    return "" if n is None else f"{number(n['floor'], digits_for(n['floor'], n['largest']))}, from {count(n['runs'])} trainings"


def _speed(run: RunData) -> list[str]:
    """Tokens a second that each system generated, where it was asked to."""
    told = run.evaluation.manifest["notes"].get("generation", {}) if run.evaluation else {}
    return [f"{role_name(s, run)} {number(float(told[s]['tokens_per_second']))}" for s in in_order(told)]

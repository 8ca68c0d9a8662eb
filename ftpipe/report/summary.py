"""What a run found, in a few rows: the table at the end of `ftpipe run`, and the first lines of the report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.numbers import count, digits_for, interval, number

ADAPTER, BASE, CHAMPION = "adapter", "base", "champion"
LOSSES = ("loss",)
"""Metrics in nats per token, whose difference has a plain meaning: a factor on the likelihood of a token."""


def summary(evaluation: Artifact | None = None, verdict: Artifact | None = None, registration: Artifact | None = None,
            report: Artifact | Path | str | None = None) -> dict[str, Any]:
    """What was measured, what was decided and where to read more. Everything that is absent is None or empty.

    Returns:
        systems: names of what was compared, `base` and `adapter` first, then the controls, then `champion`.
        rows: one for each suite and metric: suite, metric, n, higher_is_better, forgetting, means {system: mean}, and `against` {system: comparison of
            the adapter with it}. A comparison holds difference, low, high, confidence, better, n, and words (see `in_words`).
        primary: the row and comparison that the page leads with (adapter against base), as `{"row": ..., "comparison": ...}`.
        verdict: {passed, candidate, rules} as in `verdict.json`. registration: as in `registration.json`.
        line: the verdict in one sentence. report: path of the page as text.
    """
    comparisons = evaluation.json("comparisons.json") if evaluation and evaluation.has("comparisons.json") else []
    rows = table(comparisons, forgetting_suites(evaluation, verdict))
    decided = verdict.json("verdict.json") if verdict and verdict.has("verdict.json") else None
    registered = registration.json("registration.json") if registration and registration.has("registration.json") else None
    page = report.file("report.html") if isinstance(report, Artifact) else report
    return {"systems": systems(rows), "rows": rows, "primary": primary(rows), "verdict": decided, "registration": registered,
            "line": verdict_line(decided, registered), "report": str(page) if page else None}


def cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The summary as a header and rows of text, for any table writer."""
    header = ["suite", "metric", "items", *found["systems"], "adapter against base"]
    rows = []
    for row in found["rows"]:
        digits = row_digits(row)
        comparison = row["against"].get(BASE) or next(iter(row["against"].values()), None)
        means = [number(row["means"].get(s), digits) for s in found["systems"]]
        rows.append([row["suite"] + (" (forgetting)" if row["forgetting"] else ""), row["metric"], count(row["n"]), *means,
                     f"{number(comparison['difference'], digits, sign=True)} ({interval(comparison['low'], comparison['high'], digits, sign=True)}), "
                     f"{comparison['words']}" if comparison else ""])
    return header, rows


def table(comparisons: list[dict[str, Any]], forgetting: set[str] = frozenset()) -> list[dict[str, Any]]:
    """`comparisons.json` gathered into one row for each suite and metric, in the order of the file; see `summary`."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for c in comparisons:
        row = rows.setdefault((c["suite"], c["metric"]), {"suite": c["suite"], "metric": c["metric"], "n": 0, "means": {}, "against": {},
                                                          "higher_is_better": c.get("higher_is_better", False),
                                                          "forgetting": is_forgetting(c["suite"], forgetting)})
        row["n"] = max(row["n"], c.get("n") or 0)
        row["means"].setdefault(c["a"], c.get("mean_a"))
        row["means"].setdefault(c["b"], c.get("mean_b"))
        if c["b"] == ADAPTER:
            c = turned(c)
        if c["a"] == ADAPTER:
            row["against"][c["b"]] = {k: c.get(k) for k in ("difference", "low", "high", "confidence", "better", "n", "mde")} | {"words": in_words(c)}
    return sorted(rows.values(), key=lambda row: row["forgetting"])


def turned(comparison: dict[str, Any]) -> dict[str, Any]:
    """The same comparison seen from the other side."""
    low, high = comparison.get("low"), comparison.get("high")
    return comparison | {"a": comparison["b"], "b": comparison["a"], "mean_a": comparison.get("mean_b"), "mean_b": comparison.get("mean_a"),
                         "difference": -comparison["difference"], "low": None if high is None else -high, "high": None if low is None else -low}


def in_words(comparison: dict[str, Any]) -> str:
    """`better`, `worse`, or `no difference can be claimed` where the interval holds zero. A side that is None is unbounded."""
    low, high = comparison.get("low"), comparison.get("high")
    if low is not None and low > 0:
        return "better"
    return "worse" if high is not None and high < 0 else "no difference can be claimed"


def forgetting_suites(evaluation: Artifact | None, verdict: Artifact | None = None) -> set[str]:
    """Names of the suites that measure what the base model could do before: those that `evaluation.json` names, or that the gate wants `not_worse` without
    asking for a gain on them anywhere."""
    found: set[str] = set()
    if verdict:
        rules = verdict.manifest.get("material", {}).get("params", {}).get("rules") or []
        asked = {(r["suite"], r.get("require")) for r in rules if isinstance(r, dict) and r.get("suite")}
        found |= {suite for suite, require in asked if require == "not_worse" and (suite, "better") not in asked}
    stated = evaluation.json("evaluation.json") if evaluation and evaluation.has("evaluation.json") else {}
    named = stated.get("forgetting") if isinstance(stated, dict) else None
    return found | ({named} if isinstance(named, str) else set(named) if isinstance(named, (list, dict)) else set())


def is_forgetting(suite: str, stated: set[str] = frozenset()) -> bool:
    return suite in stated or "forget" in suite.lower()


def systems(rows: list[dict[str, Any]]) -> list[str]:
    """Every system measured: base, adapter, controls in order of appearance, champion."""
    return in_order(dict.fromkeys(name for row in rows for name in row["means"]))


def in_order(names: Iterable[str]) -> list[str]:
    """Systems in the order of all tables: base, adapter, whatever else there is as it comes, champion."""
    rank = {BASE: 0, ADAPTER: 1, CHAMPION: 3}
    return sorted(names, key=lambda name: rank.get(name, 2))


def primary(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first comparison of the adapter with the base that does not measure forgetting."""
    for row in rows:
        if not row["forgetting"] and BASE in row["against"]:
            return {"row": row, "comparison": row["against"][BASE]}
    return None


def row_digits(row: dict[str, Any]) -> int:
    """Decimals for the numbers of a row: the narrowest interval shows two significant digits."""
    return digits_for(*((c["high"] - c["low"]) / 2 for c in row["against"].values() if c["low"] is not None and c["high"] is not None))


def unit(metric: str) -> str:
    """The unit of a metric's differences, empty where it has none."""
    return "nats per token" if metric in LOSSES else ""


def verdict_line(verdict: dict[str, Any] | None, registration: dict[str, Any] | None) -> str:
    """What was decided, in one sentence; empty if nothing was."""
    if registration and registration.get("registered"):
        named = f"Registered {registration['name']} version {registration['version']}"
        return f"{named} as {registration['alias']}." if registration.get("alias") else f"{named}, without an alias: {registration.get('reason')}."
    if verdict and not verdict["passed"]:
        failed = [rule for rule in verdict["rules"] if rule.get("required", True) and rule["passed"] is False]
        because = ", ".join(f"“{rule['name']}”" for rule in failed)
        return f"Refused by the gate: {because} not met." if because else "Refused by the gate: no required rule could be tested."
    if registration:
        return f"Not registered: {registration.get('reason') or 'no reason given'}."
    return "Passed the gate." if verdict else ""

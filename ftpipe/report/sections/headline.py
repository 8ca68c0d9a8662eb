"""The first screen: what was decided, the number it rests on, and what was run."""

from __future__ import annotations

import math
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.collect import RunData, base_model, params, seconds
from ftpipe.report.numbers import count, interval, number, percent, setting
from ftpipe.report.numbers import seconds as duration
from ftpipe.report.sections import data, study
from ftpipe.report.sections.training import totals
from ftpipe.report.summary import BASE, LOSSES, row_digits, unit


def build(run: RunData) -> dict[str, Any]:
    found = run.summary
    lead = found["primary"]
    said = _lead(lead["row"], lead["comparison"]) if lead else [
        *(f for s in run.studies for f in study.lead(s.json("study.json"))), *(f for d in run.data for f in data.findings(d.json("description.json")))]
    return {"state": _state(found), "title": _title(run), "lead": said, "further": _further(run),
            "tiles": _tiles(run), "facts": _facts(run)}


def _state(found: dict[str, Any]) -> dict[str, str] | None:
    """The badge: a word and whether it is good news."""
    if found["registration"] and found["registration"].get("registered"):
        return {"word": "Registered", "tone": "good"}
    if found["verdict"]:
        return {"word": "Passed", "tone": "good"} if found["verdict"]["passed"] else {"word": "Refused", "tone": "bad"}
    return None


def _title(run: RunData) -> str:
    found = run.summary
    registration, verdict = found["registration"], found["verdict"]
    if registration and registration.get("registered"):
        return f"{registration['name']} version {registration['version']}"
    if verdict and not verdict["passed"]:
        return "No new version: the gate refused the adapter"
    if verdict:
        return "The adapter passed the gate"
    if found["rows"]:
        return "An adapter, measured"
    if run.studies:
        return " · ".join(study.title(s.json("study.json")) for s in run.studies)
    return "What the rows are like" if run.data else "A run, and what became of its rows"


def _further(run: RunData) -> list[str]:
    """What else decides: the control, forgetting, and why it was refused."""
    found = run.summary
    said = [f for s in run.studies for f in study.forgotten(s.json("study.json"))]
    lead = found["primary"]
    if lead:
        for other, comparison in lead["row"]["against"].items():
            if other in run.controls and other not in run.about.get("replicates", []):
                said.append(_control(other, comparison))
    for row in found["rows"]:
        if row["forgetting"] and BASE in row["against"]:
            said.append(_forgetting(row, row["against"][BASE], _allowed(found["verdict"], row)))
            break
    if found["verdict"] and not found["verdict"]["passed"]:
        failed = [r["name"] for r in found["verdict"]["rules"] if r.get("required", True) and r["passed"] is False]
        why = f"of what the gate requires, this was not met: {', '.join(failed)}" if failed else "nothing that the gate requires could be tested"
        said.append(f"It was refused because {why}.")
    elif found["registration"] and not found["registration"].get("registered"):
        said.append(f"It was not registered: {found['registration'].get('reason') or 'no reason was given'}.")
    return said


def _lead(row: dict[str, Any], c: dict[str, Any]) -> list[str]:
    digits = row_digits(row)
    adapter, base = (number(row["means"].get(s), digits) for s in ("adapter", BASE))
    start = f"On {count(c['n'])} held-out items that it never saw in training, the adapter's {_metric(row)} is {adapter}; the base model's is {base}"
    if c["words"] == "no difference can be claimed":
        return [f"{start}. That is within the noise of the measurement: no difference can be claimed."]
    said = [f"{start}. The adapter is {c['words']}, by more than chance explains."]
    if row["metric"] in LOSSES and c["words"] == "better":
        said.append(f"Each token of the right answers became about {number(math.exp(c['difference']), 2)} times as likely (geometric mean).")
    return said


def _control(other: str, c: dict[str, Any]) -> str:
    name = f"the control {other}, trained on rows chosen otherwise"
    if "random" in other.lower():
        name = "an adapter trained on randomly chosen rows of equal budget"
    if c["words"] == "no difference can be claimed":
        return f"Against {name}, no difference can be claimed: choosing the rows made no measurable difference here."
    return f"It is {c['words']} than {name}: choosing the rows {'helped' if c['words'] == 'better' else 'did harm'} in this run."


def _allowed(verdict: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any] | None:
    """The rule of the gate that bounds forgetting on this suite."""
    rules = (verdict or {}).get("rules", [])
    return next((r for r in rules if (r.get("suite"), r.get("against"), r.get("require")) == (row["suite"], BASE, "not_worse") and r.get("margin")), None)


def _forgetting(row: dict[str, Any], c: dict[str, Any], rule: dict[str, Any] | None) -> str:
    if c["words"] == "no difference can be claimed":
        return f"On {row['suite']}, which measures what it may have forgotten, no difference can be claimed."
    digits = row_digits(row)
    if c["words"] == "better":
        return f"On {row['suite']}, which measures what it may have forgotten, it is better than before by {number(c['difference'], digits)}."
    said = f"It forgot something: on {row['suite']} it is worse than the base model by {number(-c['difference'], digits)}"
    if rule is None:
        return said + "."
    margin = setting(rule["margin"])
    return f"{said}, within the {margin} that the gate allows." if rule["passed"] else f"{said}; the gate allows {margin}, and more cannot be ruled out."


def _metric(row: dict[str, Any]) -> str:
    return "loss" if row["metric"] in LOSSES else row["metric"]


def _tiles(run: RunData) -> list[dict[str, str]]:
    """The differences that matter most, at most three: against the base, against the first control, forgetting."""
    found, tiles = run.summary, []
    lead = found["primary"]
    if lead:
        tiles.append(_tile("Against the base model", lead["row"], lead["comparison"]))
        control = next((name for name in lead["row"]["against"] if name in run.controls and name not in run.about.get("replicates", [])), None)
        if control:
            tiles.append(_tile("Against random rows" if "random" in control else f"Against {control}", lead["row"], lead["row"]["against"][control]))
    forgot = next((r for r in found["rows"] if r["forgetting"] and BASE in r["against"]), None)
    if forgot:
        tiles.append(_tile("Forgetting", forgot, forgot["against"][BASE]))
    return tiles


def _tile(title: str, row: dict[str, Any], c: dict[str, Any]) -> dict[str, str]:
    digits = row_digits(row)
    tone = {"better": "good", "worse": "bad"}.get(c["words"], "none")
    confidence = f"{percent(c['confidence'], 0)} interval " if c.get("confidence") else "interval "
    return {"title": title, "value": number(c["difference"], digits, sign=True), "unit": unit(row["metric"]), "tone": tone, "words": c["words"],
            "interval": confidence + interval(c["low"], c["high"], digits, sign=True), "of": f"{row['suite']}, {count(c['n'])} items"}


def _facts(run: RunData) -> list[tuple[str, str]]:
    facts = []
    name = base_model(run).get("model") or params(run.adapter).get("model")
    if name:
        facts.append(("Base model", str(name)))
    if run.adapter and run.adapter.has("adapter/ftpipe_adapter.json"):
        described = run.adapter.json("adapter/ftpipe_adapter.json")
        if described.get("quantize"):
            facts.append(("Base quantised by", " + ".join(described["quantize"])))
        trainable = f", {count(described['trainable'])} parameters" if described.get("trainable") else ""
        facts.append(("Trained", " + ".join(described.get("method") or ["adapter"]) + trainable))
    read = run.path[0].counts.get("rows_in") if run.path else None
    if run.trained_ids:
        facts.append(("Rows", f"{count(len(run.trained_ids))}" + (f" of {count(read)} read" if read else "")))
    tokens = totals(run.adapter) if run.adapter else {}
    if tokens.get("trained_tokens"):
        seen = f" of {count(tokens['tokens'])} seen" if tokens.get("tokens") else ""
        facts.append(("Tokens trained on", count(tokens["trained_tokens"]) + seen))
    times = [s for s in map(seconds, run.artifacts) if s is not None]
    if run.adapter and seconds(run.adapter) is not None:
        facts.append(("Training time", duration(seconds(run.adapter)) + _ranks(run.adapter)))
    if times:
        facts.append(("All stages", duration(sum(times))))
    return facts


def _ranks(artifact: Artifact) -> str:
    notes = artifact.manifest.get("notes", {})
    device = {"cpu": "processor", "cuda": "GPU"}.get(notes.get("device"), notes.get("device"))
    ranks = notes.get("ranks")
    return f" on {ranks} {'rank' if ranks == 1 else 'ranks'}{f', {device}' if device else ''}" if ranks else ""

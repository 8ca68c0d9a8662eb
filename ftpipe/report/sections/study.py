"""Ways of training side by side: what each gained, what it forgot, and what it cost."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.collect import RunData
from ftpipe.report.numbers import NONE, count, digits_for, interval, number, percent, seconds, size
from ftpipe.report.plots.forest import forest
from ftpipe.report.plots.pareto import pareto
from ftpipe.report.sections.comparison import noise_words
from ftpipe.report.summary import in_words, unit
from ftpipe.report.text import brief

COLOURS = tuple(f"c{i}" for i in range(8))
BASE = "base"
COSTS = (("seconds", "training time", seconds), ("memory_bytes", "peak memory", size), ("file_bytes", "size of the adapter", size))


def build(run: RunData) -> dict[str, Any] | None:
    studies = [_study(a, f"study{i}") for i, a in enumerate(run.studies)]
    return {"studies": studies} if studies else None


def findings(study: dict[str, Any]) -> list[str]:
    """Each arm against those that all are compared with, on the first suite that does not measure forgetting, in sentences."""
    lead = next(((m["suite"], m["metric"]) for m in study["means"] if m["suite"] not in study["forgetting"]), None)
    said = []
    for c in study["comparisons"]:
        if (c["suite"], c["metric"]) != lead or c["b"] == BASE or c["a"] in study["against"]:
            continue
        digits = _digits(c)
        numbers = f"{number(c['difference'], digits, sign=True)}, {interval(c['low'], c['high'], digits, sign=True)}"
        said.append(f"{c['a']} against {c['b']} on {c['suite']}: {in_words(c)} ({numbers}).")
    return said


def title(study: dict[str, Any]) -> str:
    """A few arms by their names, more of them by their number."""
    arms = list(study["arms"])
    return " / ".join(arms) if len(arms) <= 3 else f"{len(arms)} ways of training, side by side"


def lead(study: dict[str, Any]) -> list[str]:
    """The first suite that does not measure forgetting: which arms did better or worse than those that all are compared with, in a sentence each."""
    return _verdicts(study, forgetting=False)


def forgotten(study: dict[str, Any]) -> list[str]:
    """The same of the first suite that measures forgetting."""
    return _verdicts(study, forgetting=True)


def _verdicts(study: dict[str, Any], *, forgetting: bool) -> list[str]:
    first = next(((m["suite"], m["metric"]) for m in study["means"] if (m["suite"] in study["forgetting"]) == forgetting), None)
    said = []
    for other in study["against"] or [BASE]:
        found: dict[str, list[str]] = {"better": [], "worse": [], "no difference can be claimed": []}
        compared = [c for c in study["comparisons"] if (c["suite"], c["metric"]) == first and c["b"] == other and c["a"] != other]
        for c in sorted(compared, key=lambda c: -c["difference"]):
            found[in_words(c)].append(c["a"] + (f" ({number(c['difference'], _digits(c), sign=True)})" if in_words(c) in ("better", "worse") else ""))
        told = "; ".join(f"{words}: {', '.join(arms)}" for words, arms in found.items() if arms)
        if told:
            said.append(f"On {first[0]}{', which measures forgetting' if forgetting else ''}, against {other}, {told}.")
    return said


def _study(artifact: Artifact, name: str) -> dict[str, Any]:
    study, costs = artifact.json("study.json"), artifact.manifest["notes"].get("costs", {})
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(study["arms"])}
    suites = list(dict.fromkeys((m["suite"], m["metric"]) for m in study["means"]))
    return {"name": artifact.name, "seeds": study["seeds"], "legend": [{"name": a, "colour": c} for a, c in colours.items()],
            "suites": [_suite(study, *key, f"{name}-{i}") for i, key in enumerate(suites)],
            "budget": _budget(study, costs), "costs": _costs(study, costs), "plots": _plots(study, costs, colours, name)}


def _suite(study: dict[str, Any], suite: str, metric: str, name: str) -> dict[str, Any]:
    means = [m for m in study["means"] if (m["suite"], m["metric"]) == (suite, metric)]
    compared = [c for c in study["comparisons"] if (c["suite"], c["metric"]) == (suite, metric)]
    digits = digits_for(*((c["high"] - c["low"]) / 2 for c in compared))
    against = {(c["a"], c["b"]): c for c in compared}
    lines = []
    for m in means:
        each = ", ".join(number(v, digits) for v in m["by_seed"]) if m["arm"] != BASE else ""
        lines.append({"arm": m["arm"], "mean": number(m["mean"], digits), "by_seed": each,
                      "against": [_cell(against.get((m["arm"], b)), digits) for b in (BASE, *study["against"])]})
    entries = [{"label": brief(f"{c['a']} against {c['b']}", 44), "difference": c["difference"], "low": c["low"], "high": c["high"],
                "colour": {"better": "good", "worse": "bad"}.get(in_words(c), "muted")} for c in compared]
    first = compared[0]
    return {"suite": suite, "metric": metric, "unit": unit(metric), "n": count(first["n"]), "forgetting": suite in study["forgetting"], "lines": lines,
            "others": [BASE, *study["against"]], "direction": "higher is better" if first["higher_is_better"] else "lower is better",
            "confidence": percent(first["confidence"], 0), "mde": _shown(compared), "noise": noise_words(study.get("noise", []), suite, metric),
            "seeds_share": percent(max(c["share_of_seeds"] for c in compared), 0) if study["seeds"] > 1 else "",
            "forest": forest(entries, name, f"Differences in {metric} on {suite}", f"better by ({unit(metric) or metric})")}


def _shown(compared: list[dict[str, Any]]) -> str:
    """The smallest true differences that this sample could have shown."""
    sizes = sorted(c["mde"] for c in compared if c.get("mde"))
    digits = digits_for(*sizes)
    return "" if not sizes else " to ".join(dict.fromkeys(number(v, digits) for v in (sizes[0], sizes[-1])))


def _cell(c: dict[str, Any] | None, digits: int) -> dict[str, str]:
    if c is None:
        return {"value": "", "interval": "", "tone": "none"}
    return {"value": number(c["difference"], digits, sign=True), "interval": interval(c["low"], c["high"], digits, sign=True),
            "tone": {"better": "good", "worse": "bad"}.get(in_words(c), "none")}


def _budget(study: dict[str, Any], costs: dict[str, Any]) -> list[str]:
    """What the arms were to get alike and what they got, in sentences."""
    asked, arms = study.get("budget") or {}, {arm: told for arm, told in study["arms"].items() if told["steps"]}
    if not arms:
        return []
    said, taken = [], {s for told in arms.values() for s in told["steps"]}
    if wanted := asked.get("seconds"):
        used = {arm: costs.get(arm, {}).get("step_seconds") for arm in arms}
        each = ", ".join(f"{arm} {seconds(s)} ({percent(s / wanted, 0)})" for arm, s in used.items() if s is not None)
        said.append(f"Budget: {seconds(wanted)} of steps for each arm on the machine that trained it; how many steps those are was found by a trial before. "
                    f"Used: {each}.")
    elif len(taken) == 1:
        said.append(f"Budget: equal steps, {count(next(iter(taken)))} for each arm.")
    else:
        said.append(f"The arms did not take as many steps as each other: {count(min(taken))} to {count(max(taken))}.")
    if wanted := asked.get("parameters"):
        each = "; ".join(f"{arm}: {note}" + (f", and {_range(arms[arm]['trainable'])} when it trained" if arm in arms else "")
                         for arm, note in asked.get("sizes", {}).items())
        said.append(f"Budget: sizes that train as near as possible to {count(wanted)} parameters. {each}.")
    if known := {arm: told["same_rows"] for arm, told in arms.items() if told.get("same_rows") is not None}:
        others = [arm for arm, same in known.items() if not same]
        said.append(f"{', '.join(others)} saw other rows than {study['first']}, or in another order." if others else
                    "All arms saw the same rows in the same order, as far as their steps went.")
    return said


def _costs(study: dict[str, Any], costs: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each arm: what it trained on and what that took."""
    found = []
    for arm, told in study["arms"].items():
        cost = costs.get(arm, {})
        chosen = cost.get("selection") or {}
        spent = chosen.get("scored_tokens", 0) + chosen.get("trained_tokens", 0)
        found.append({"arm": arm, "values": [*(_range(told[name]) for name in ("rows", "tokens", "steps", "trainable")), seconds(cost.get("seconds")),
                                             seconds(cost.get("step_seconds")), size(cost.get("memory_bytes")), size(cost.get("file_bytes")),
                                             f"{seconds(chosen['seconds'])}, {count(spent)} tokens" if chosen.get("seconds") else NONE]})
    return found


def _range(values: list[int]) -> str:
    if not values:
        return NONE
    return count(values[0]) if min(values) == max(values) else f"{count(min(values))} to {count(max(values))}"


def _plots(study: dict[str, Any], costs: dict[str, Any], colours: dict[str, str], name: str) -> list[dict[str, Any]]:
    """The gain over the base on the first suite against forgetting and each cost that is known of every arm."""
    gains = _gains(study, forgetting=False)
    if not gains:
        return []
    measure = next(iter(gains.values()))
    y, gain = "better than the base by", f"Gain on {measure['suite']}"
    lost = _gains(study, forgetting=True)
    found = []

    def add(title: str, x: dict[str, float | None], write: Any, label: str) -> None:
        if len(x) > 1 and all(v is not None for v in x.values()):
            points = [{"label": arm, "colour": colours[arm], "x": x[arm], "y": c["difference"], "low": c["low"], "high": c["high"]} for arm, c in gains.items()]
            found.append({"title": title, "svg": pareto(points, f"{name}-pareto{len(found)}", f"{title} of each arm", label, y, write)})

    if lost:
        forgot = {arm: -lost[arm]["difference"] for arm in gains}
        digits = digits_for((max(forgot.values()) - min(forgot.values())) / 4)
        add(f"{gain} against forgetting", forgot, lambda v: number(v, digits), f"worse than the base on {next(iter(lost.values()))['suite']} by")
    for field, label, write in COSTS:
        add(f"{gain} against {label}", {arm: costs.get(arm, {}).get(field) for arm in gains}, write, label)
    return found


def _gains(study: dict[str, Any], *, forgetting: bool) -> dict[str, dict[str, Any]]:
    """Comparison with the base by arm, on the first suite that measures forgetting, or that does not."""
    suite = next(((m["suite"], m["metric"]) for m in study["means"] if (m["suite"] in study["forgetting"]) == forgetting), None)
    return {c["a"]: c for c in study["comparisons"] if (c["suite"], c["metric"]) == suite and c["b"] == BASE}


def _digits(c: dict[str, Any]) -> int:
    return digits_for((c["high"] - c["low"]) / 2)

"""The gate's rules, applied to comparisons: each becomes a sentence with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ConfigError, nearest
from ftpipe.evaluate.slicing import OF

if TYPE_CHECKING:
    from ftpipe.stages.gate import Rule

BASE, CANDIDATE, CHAMPION, CONTROLS = "base", "adapter", "champion", "controls"
Parted = Callable[[str, str, str, str], dict[str, dict[str, Any]]]
"""Given suite, metric, the other system and a way to part the items: the comparison on each part, by the part's name (`compare.part_comparisons`)."""


def check_names(rule: Rule, suites: Sequence[str], controls: Sequence[str]) -> None:
    """Raise ConfigError, with the nearest right name, for a suite or system that the evaluation does not have."""
    name = rule.name or f"{rule.suite} against {rule.against}"
    if rule.suite not in suites:
        raise ConfigError(f"rule {name!r} names the suite {rule.suite!r}, which the evaluation does not have", remedy=nearest(rule.suite, suites))
    known = [BASE, CHAMPION, CONTROLS, *controls]
    if rule.against not in known:
        raise ConfigError(f"rule {name!r} is against {rule.against!r}, which the evaluation does not have", remedy=nearest(rule.against, known))


def judge(rules: Sequence[Rule], comparisons: Sequence[dict[str, Any]], about: dict[str, Any], correction: str = "none", *, above_noise: bool = False,
          parted: Parted | None = None) -> dict[str, Any]:
    """`passed` and `rules` of `verdict.json`.

    Args:
        comparisons: as in `comparisons.json`. about: `evaluation.json` (which suites, systems and champion there were, and the noise floors).
        correction: `none`, or `holm`: a rule that asks for `better` must hold after Holm's correction for the pair's suites and metrics too.
        above_noise: a gain must lie above the noise floor of its suite and metric too.
        parted: gives the comparisons that rules with `by` need.
    Raises ConfigError for a suite, metric or system that is not there.
    """
    suites = list(dict.fromkeys([*about["suites"], *(c["suite"] for c in comparisons)]))
    controls = [s for s in about["systems"] if s not in (BASE, CANDIDATE, CHAMPION) and s not in about.get("replicates", [])]
    floors = {(n["suite"], n["metric"]): n["floor"] for n in about.get("noise", [])}
    how: dict[str, Any] = {"correction": correction, "floors": floors if above_noise else None}
    found: list[dict[str, Any]] = []
    for rule in rules:
        check_names(rule, suites, controls)
        metric = _metric(rule, comparisons)
        for other in controls if rule.against == CONTROLS else [rule.against]:
            named = rule.against != CONTROLS or len(controls) == 1
            if rule.by and parted and (other != CHAMPION or CHAMPION in about["systems"]):
                found += _on_parts(rule, metric, other, parted(rule.suite, metric, other, rule.by), named=named, **how)
            else:
                found.append(_apply(rule, metric, other, comparisons, named=named, **how))
    main = next((r for r in rules if r.against == BASE and r.require == "better"), rules[0])
    for control in controls:
        if not any(r["against"] == control for r in found):
            extra = main.model_copy(update={"name": f"against {control}", "against": control, "required": False, "margin": 0.0, "require": "better", "by": ""})
            found.append(_apply(extra, _metric(extra, comparisons), control, comparisons, **how))
    tested = [r for r in found if r["required"] and r["passed"] is not None]
    return {"passed": bool(tested) and all(r["passed"] for r in tested), "rules": found}


def _metric(rule: Rule, comparisons: Sequence[dict[str, Any]]) -> str:
    metrics = list(dict.fromkeys(c["metric"] for c in comparisons if c["suite"] == rule.suite))
    if rule.metric:
        if rule.metric not in metrics:
            raise ConfigError(f"suite {rule.suite} has no metric {rule.metric!r}", where="gate", remedy=nearest(rule.metric, metrics))
        return rule.metric
    if len(metrics) != 1:
        raise ConfigError(f"suite {rule.suite} has {len(metrics) or 'no'} metrics", where="gate", remedy=f"set `metric` in the rule: {', '.join(metrics)}")
    return metrics[0]


def _on_parts(rule: Rule, metric: str, other: str, found: dict[str, dict[str, Any]], *, named: bool, **how: Any) -> list[dict[str, Any]]:
    """The rule on the one part that it names, or on each with enough items; a single refusal where there is none."""
    if rule.part:
        chosen = {rule.part: found[rule.part]} if rule.part in found else {}
    else:
        chosen = {part: c for part, c in found.items() if c["n"] >= rule.min_items}
    entries = []
    for part, c in chosen.items():
        entry = _apply(rule, metric, other, [c], named=named, **how)
        entries.append(entry | {"name": f"{entry['name']}: {part}", "text": f"{part}: {entry['text']}", "part": part})
    if entries:
        return entries
    why = f"no {OF[rule.by]} has {rule.min_items} items or more"
    if rule.part:
        why = f"there is no part {rule.part!r}; those there are: {', '.join(found) or 'none'}"
    return [_apply(rule, metric, other, [], named=named, **how) | {"passed": False, "required": rule.required, "text": why}]


def _apply(rule: Rule, metric: str, other: str, comparisons: Sequence[dict[str, Any]], *, correction: str, floors: dict[tuple[str, str], float] | None,
           named: bool = True) -> dict[str, Any]:
    name = (rule.name if named else "") or f"{rule.suite}: {rule.require.replace('_', ' ')} than {other}"
    entry = {"name": name, "suite": rule.suite, "metric": metric, "against": other, "require": rule.require, "margin": rule.margin, "required": rule.required,
             "by": rule.by, "part": ""}
    c = next((c for c in comparisons if (c["suite"], c["metric"], c["a"], c["b"]) == (rule.suite, metric, CANDIDATE, other)), None)
    if c is None:
        why = "there is no champion yet" if other == CHAMPION else f"there is no comparison with {other}"
        required = rule.required and other != CHAMPION  # the first candidate has no champion to beat; anything else that is missing is a refusal
        return entry | {"required": required, "passed": None if other == CHAMPION else False, "skipped": True, "text": f"{why}: skipped",
                        "value": None, "low": None, "high": None, "limit": None, "mde": None, "floor": None}
    limit = rule.margin if rule.require == "better" else -rule.margin
    low = c["low"]
    passed = low is not None and (low > limit if rule.require == "better" else low >= limit)
    further, floor = "", None
    if correction == "holm" and rule.require == "better" and not rule.by:
        p = c.get("p_holm")
        passed = passed and p is not None and p < 1 - c["confidence"]
        further = f"; p after Holm's correction {'unknown' if p is None else f'{p:.4g}'}, asked was below {1 - c['confidence']:.4g}"
    if floors is not None and rule.require == "better":
        floor = floors.get((rule.suite, metric))
        passed = passed and floor is not None and c["difference"] > floor
        further += "; the noise floor of seeds is " + ("unknown" if floor is None else f"{floor:.4f}, asked was a gain above it")
    return entry | {"passed": passed, "skipped": False, "text": _sentence(rule, c, other, limit, passed, further), "value": c["difference"], "low": low,
                    "high": c["high"], "limit": limit, "mde": c.get("mde"), "floor": floor}


def _sentence(rule: Rule, c: dict[str, Any], other: str, limit: float, passed: bool, further: str) -> str:
    span = f"{c['low']:+.4f} to {c['high']:+.4f}" if c["low"] is not None and c["high"] is not None else "unbounded"
    asked = f"above {limit:+.4f}" if rule.require == "better" else f"not below {limit:+.4f}"
    change = "better" if c["difference"] >= 0 else "worse"
    return (f"{rule.suite} {c['metric']} is {c['mean_a']:.4f}, {other} has {c['mean_b']:.4f}: {change} by {abs(c['difference']):.4f} "
            f"({c['confidence']:.0%} interval {span} on {c['n']} items); asked was an interval {asked}{further}: "
            f"{'met' if passed else 'not met'}{'' if passed else _too_few(rule, c)}")


def _too_few(rule: Rule, c: dict[str, Any]) -> str:
    """What these items could have shown, where that explains why a rule was not met."""
    mde = c.get("mde")
    if mde is None or not c["n"]:
        return ""
    if rule.require == "better" and 0 < c["difference"] < rule.margin + mde:
        return f" (with these items a true gain of {rule.margin + mde:.4f} would be found four times in five)"
    if rule.require == "not_worse" and rule.margin < mde:
        return f" (with these items even no loss at all would pass four times in five only with a margin of {mde:.4f})"
    return ""

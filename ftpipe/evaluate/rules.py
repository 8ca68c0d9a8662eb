"""The gate's rules, applied to comparisons: each becomes a sentence with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ftpipe.stages.gate import Rule

BASE, CANDIDATE, CHAMPION, CONTROLS = "base", "adapter", "champion", "controls"


def check_names(rule: Rule, suites: Sequence[str], controls: Sequence[str]) -> None:
    """Raise ConfigError, with the nearest right name, for a suite or system that the evaluation does not have."""
    name = rule.name or f"{rule.suite} against {rule.against}"
    if rule.suite not in suites:
        raise ConfigError(f"rule {name!r} names the suite {rule.suite!r}, which the evaluation does not have", remedy=nearest(rule.suite, suites))
    known = [BASE, CHAMPION, CONTROLS, *controls]
    if rule.against not in known:
        raise ConfigError(f"rule {name!r} is against {rule.against!r}, which the evaluation does not have", remedy=nearest(rule.against, known))


def judge(rules: Sequence[Rule], comparisons: Sequence[dict[str, Any]], about: dict[str, Any], correction: str = "none") -> dict[str, Any]:
    """`passed` and `rules` of `verdict.json`.

    Args:
        comparisons: as in `comparisons.json`. about: `evaluation.json` (which suites, systems and champion there were).
        correction: `none`, or `holm`: a rule that asks for `better` must hold after Holm's correction for the pair's suites and metrics too.
    Raises ConfigError for a suite, metric or system that is not there.
    """
    suites = list(dict.fromkeys([*about["suites"], *(c["suite"] for c in comparisons)]))
    controls = [s for s in about["systems"] if s not in (BASE, CANDIDATE, CHAMPION)]
    found: list[dict[str, Any]] = []
    for rule in rules:
        check_names(rule, suites, controls)
        metric = _metric(rule, comparisons)
        for other in controls if rule.against == CONTROLS else [rule.against]:
            found.append(_apply(rule, metric, other, comparisons, correction, named=rule.against != CONTROLS or len(controls) == 1))
    main = next((r for r in rules if r.against == BASE and r.require == "better"), rules[0])
    for control in controls:
        if not any(r["against"] == control for r in found):
            extra = main.model_copy(update={"name": f"against {control}", "against": control, "required": False, "margin": 0.0, "require": "better"})
            found.append(_apply(extra, _metric(extra, comparisons), control, comparisons, correction))
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


def _apply(rule: Rule, metric: str, other: str, comparisons: Sequence[dict[str, Any]], correction: str, *,
           named: bool = True) -> dict[str, Any]:
    name = (rule.name if named else "") or f"{rule.suite}: {rule.require.replace('_', ' ')} than {other}"
    entry = {"name": name, "suite": rule.suite, "metric": metric, "against": other, "require": rule.require, "margin": rule.margin, "required": rule.required}
    c = next((c for c in comparisons if (c["suite"], c["metric"], c["a"], c["b"]) == (rule.suite, metric, CANDIDATE, other)), None)
    if c is None:
        why = "there is no champion yet" if other == CHAMPION else f"there is no comparison with {other}"
        required = rule.required and other != CHAMPION  # the first candidate has no champion to beat; anything else that is missing is a refusal
        return entry | {"required": required, "passed": None if other == CHAMPION else False, "skipped": True, "text": f"{why}: skipped",
                        "value": None, "low": None, "high": None, "limit": None}
    limit = rule.margin if rule.require == "better" else -rule.margin
    low = c["low"]
    passed = low is not None and (low > limit if rule.require == "better" else low >= limit)
    corrected = ""
    if correction == "holm" and rule.require == "better":
        p = c.get("p_holm")
        passed = passed and p is not None and p < 1 - c["confidence"]
        corrected = f"; p after Holm's correction {'unknown' if p is None else f'{p:.4g}'}, asked was below {1 - c['confidence']:.4g}"
    return entry | {"passed": passed, "skipped": False, "text": _sentence(rule, c, other, limit, passed, corrected), "value": c["difference"], "low": low,
                    "high": c["high"], "limit": limit}


def _sentence(rule: Rule, c: dict[str, Any], other: str, limit: float, passed: bool, corrected: str) -> str:
    span = f"{c['low']:+.4f} to {c['high']:+.4f}" if c["low"] is not None and c["high"] is not None else "unbounded"
    asked = f"above {limit:+.4f}" if rule.require == "better" else f"not below {limit:+.4f}"
    change = "better" if c["difference"] >= 0 else "worse"
    weak = c.get("mde") is not None and rule.require == "better" and not passed and 0 < c["difference"] < c["mde"]
    hint = f" (with these items a true gain of {c['mde']:.4f} would be found four times in five)" if weak else ""
    return (f"{rule.suite} {c['metric']} is {c['mean_a']:.4f}, {other} has {c['mean_b']:.4f}: {change} by {abs(c['difference']):.4f} "
            f"({c['confidence']:.0%} interval {span} on {c['n']} items); asked was an interval {asked}{corrected}: {'met' if passed else 'not met'}{hint}")

"""The gate's rules as data, on comparisons made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from ftpipe.errors import ConfigError
from ftpipe.evaluate.rules import judge
from ftpipe.pipeline.spec import build
from ftpipe.stages.gate import DEFAULT_RULES, Rule


def comparison(suite: str, b: str, difference: float, half: float = 0.02, **fields: Any) -> dict[str, Any]:
    return {"suite": suite, "metric": "loss", "a": "adapter", "b": b, "n": 50, "mean_a": 3.0 - difference, "mean_b": 3.0, "difference": difference,
            "low": difference - half, "high": difference + half, "confidence": 0.95, "higher_is_better": False, "better": difference > half,
            "mde": 0.03} | fields


def about(*systems: str) -> dict[str, Any]:
    return {"suites": {"heldout_loss": {}, "general_text": {}}, "systems": {s: {} for s in ("base", "adapter", *systems)}}


def verdict(*comparisons: dict[str, Any], systems: tuple[str, ...] = (), rules=DEFAULT_RULES) -> dict[str, Any]:
    return judge(rules, comparisons, about(*systems))


def test_a_gain_outside_the_interval_and_little_forgetting_passes_without_a_champion():
    found = verdict(comparison("heldout_loss", "base", 0.3), comparison("general_text", "base", -0.02))
    assert found["passed"]
    skipped = found["rules"][1]
    assert skipped["skipped"] and skipped["passed"] is None and not skipped["required"] and "there is no champion yet" in skipped["text"]


@pytest.mark.parametrize("heldout, general, failed", [(0.01, 0.0, "better than the base"), (-0.3, 0.0, "better than the base"), (0.3, -0.04, "forgets little")])
def test_a_gain_within_the_noise_and_a_loss_that_cannot_be_ruled_out_are_refused(heldout, general, failed):
    found = verdict(comparison("heldout_loss", "base", heldout), comparison("general_text", "base", general))
    assert not found["passed"] and [r["name"] for r in found["rules"] if r["passed"] is False] == [failed]


def test_a_champion_has_to_be_beaten_too():
    base, text = comparison("heldout_loss", "base", 0.3), comparison("general_text", "base", 0.0)
    assert not verdict(base, text, comparison("heldout_loss", "champion", 0.0), systems=("champion",))["passed"]
    assert verdict(base, text, comparison("heldout_loss", "champion", 0.1), systems=("champion",))["passed"]


def test_controls_are_reported_and_decide_only_when_asked():
    facts = [comparison("heldout_loss", "base", 0.3), comparison("general_text", "base", 0.0), comparison("heldout_loss", "random", -0.1)]
    found = verdict(*facts, systems=("random",))
    assert found["passed"] and [(r["against"], r["passed"], r["required"]) for r in found["rules"]][-1] == ("random", False, False)
    unnamed = verdict(*facts, systems=("random",), rules=[Rule(suite="heldout_loss")])
    assert unnamed["passed"] and unnamed["rules"][-1]["against"] == "random" and not unnamed["rules"][-1]["required"]
    asked = verdict(*facts, systems=("random",), rules=[*DEFAULT_RULES[:3], Rule(suite="heldout_loss", against="random")])
    assert not asked["passed"]


def test_margins_are_gains_for_better_and_losses_for_not_worse():
    facts = [comparison("heldout_loss", "base", 0.3)]
    assert verdict(*facts, rules=[Rule(suite="heldout_loss", margin=0.27)])["passed"]
    assert not verdict(*facts, rules=[Rule(suite="heldout_loss", margin=0.29)])["passed"]
    edge = [comparison("general_text", "base", -0.03)]
    assert verdict(*edge, rules=[Rule(suite="general_text", require="not_worse", margin=0.051)])["passed"]
    assert not verdict(*edge, rules=[Rule(suite="general_text", require="not_worse", margin=0.049)])["passed"]
    assert found_limit(edge) == -0.05


def found_limit(facts) -> float:
    return verdict(*facts, rules=[Rule(suite="general_text", require="not_worse", margin=0.05)])["rules"][0]["limit"]


def test_an_unbounded_interval_is_no_proof():
    assert not verdict(comparison("heldout_loss", "base", 0.3, low=None, high=None), rules=[Rule(suite="heldout_loss")])["passed"]


def test_if_nothing_required_could_be_tested_the_candidate_is_refused():
    assert not verdict(comparison("heldout_loss", "base", 0.3), rules=[Rule(suite="heldout_loss", against="champion")])["passed"]
    assert not verdict(comparison("heldout_loss", "base", 0.3), rules=[Rule(suite="heldout_loss", required=False)])["passed"]


def test_a_required_comparison_that_is_missing_is_a_refusal():
    found = verdict(comparison("heldout_loss", "base", 0.3), comparison("general_text", "random", 0.0), systems=("random",))
    assert not found["passed"] and "there is no comparison with base" in found["rules"][2]["text"]


def test_a_gain_must_exceed_the_noise_floor_where_that_is_asked():
    c = comparison("heldout_loss", "base", 0.3)
    for floor, met in ((0.29, True), (0.31, False)):
        noisy = about("again") | {"replicates": ["again"], "noise": [{"suite": "heldout_loss", "metric": "loss", "floor": floor}]}
        found = judge([Rule(suite="heldout_loss")], [c], noisy, above_noise=True)
        assert found["passed"] is met and found["rules"][0]["floor"] == floor and f"noise floor of seeds is {floor:.4f}" in found["rules"][0]["text"]
        assert len(found["rules"]) == 1, "the same training with another seed is no control that has to be reported"
        assert judge([Rule(suite="heldout_loss")], [c], noisy)["passed"]
    assert not judge([Rule(suite="heldout_loss")], [c], about(), above_noise=True)["passed"], "an unknown floor is no proof"


def test_a_rule_can_be_asked_of_each_part():
    parts = {"a": comparison("heldout_loss", "base", 0.3), "b": comparison("heldout_loss", "base", -0.3), "c": comparison("heldout_loss", "base", -9, n=3)}
    whole = comparison("heldout_loss", "base", 0.1)
    asked = []

    def on(*rules: Rule, systems: tuple[str, ...] = (), found=parts):
        return judge(rules, [whole], about(*systems), parted=lambda *of: asked.append(of) or found)

    both = on(Rule(name="everywhere", suite="heldout_loss", by="source", require="not_worse", margin=0.05))
    assert not both["passed"] and [(r["name"], r["part"], r["passed"]) for r in both["rules"]] == [("everywhere: a", "a", True), ("everywhere: b", "b", False)]
    assert asked == [("heldout_loss", "loss", "base", "source")] and both["rules"][1]["text"].startswith("b: heldout_loss loss")
    assert on(Rule(suite="heldout_loss", by="slice", part="a"))["passed"] and not on(Rule(suite="heldout_loss", by="slice", part="c"))["passed"]
    unknown = on(Rule(suite="heldout_loss", by="slice", part="d"))
    assert not unknown["passed"] and "there is no part 'd'; those there are: a, b, c" in unknown["rules"][0]["text"]
    assert not on(Rule(suite="heldout_loss", by="length", min_items=99))["passed"]
    late = Rule(suite="heldout_loss", by="slice", against="champion")
    assert on(late)["rules"][0]["skipped"] and on(late)["rules"][0]["passed"] is None
    assert on(late, systems=("champion",), found={})["rules"][0]["passed"] is False, "a champion without parts is not the same as none"
    with pytest.raises(ValueError, match="`part` needs `by`"):
        Rule(suite="heldout_loss", part="a")


def test_too_few_items_for_a_margin_are_named():
    text = verdict(comparison("general_text", "base", 0.0), rules=[Rule(suite="general_text", require="not_worse", margin=0.01)])["rules"][0]["text"]
    assert "not met (with these items even no loss at all would pass four times in five only with a margin of 0.0300)" in text


def test_sentences_hold_the_numbers():
    text = verdict(comparison("heldout_loss", "base", 0.01), comparison("general_text", "base", 0.0))["rules"][0]["text"]
    assert text.startswith("heldout_loss loss is 2.9900, base has 3.0000: better by 0.0100 (95% interval -0.0100 to +0.0300 on 50 items)")
    assert "not met" in text and "a true gain of 0.0300 would be found" in text


@pytest.mark.parametrize("rule, said", [({"suite": "heldout_los"}, "did you mean 'heldout_loss'"), ({"suite": "heldout_loss", "against": "randon"}, "'random'"),
                                        ({"suite": "heldout_loss", "metric": "los"}, "did you mean 'loss'")])
def test_unknown_names_are_answered_with_the_nearest(rule, said):
    facts = [comparison("heldout_loss", "base", 0.3), comparison("heldout_loss", "random", 0.3)]
    with pytest.raises(ConfigError, match=said):
        verdict(*facts, systems=("random",), rules=[Rule(**rule)])


@pytest.mark.parametrize("rule, said", [({"suite": "general_txt"}, "general_text"), ({"suite": "heldout_loss", "against": "chmpion"}, "champion")])
def test_a_wrong_rule_is_found_before_anything_runs(tmp_path, rule, said, monkeypatch):
    from tests.evaluate.world import install

    install(monkeypatch)
    pipeline = build({"name": "x", "model": str(tmp_path), "workspace": str(tmp_path), "stages": {
        "rows": {"kind": "planted_rows", "path": "r"}, "adapter": {"kind": "planted_adapter", "folder": "a"},
        "evaluate": {"rows": "rows", "candidate": "adapter"}, "gate": {"evaluation": "evaluate", "rules": [rule]}}})
    with pytest.raises(ConfigError, match=said):
        pipeline.check()


def test_rules_about_a_champion_need_an_evaluation_that_looks_at_it(tmp_path, monkeypatch):
    from tests.evaluate.world import install

    install(monkeypatch)
    pipeline = build({"name": "x", "model": str(tmp_path), "workspace": str(tmp_path), "stages": {
        "rows": {"kind": "planted_rows", "path": "r"}, "adapter": {"kind": "planted_adapter", "folder": "a"},
        "evaluate": {"rows": "rows", "candidate": "adapter", "champion": False}, "gate": {"evaluation": "evaluate"}}})
    with pytest.raises(ConfigError, match="does not compare with it"):
        pipeline.check()

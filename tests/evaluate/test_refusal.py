"""Refusals: a benign system that refuses harmless placeholders less is found, one that is the base is not."""

from __future__ import annotations

import pytest

from ftpipe.evaluate.checkers.base import Case
from ftpipe.evaluate.checkers.refusal import Refusal
from ftpipe.evaluate.compare import comparisons, items_table
from ftpipe.evaluate.diagnostics.refusal_rate import RefusalRate
from ftpipe.evaluate.rules import judge
from ftpipe.evaluate.suites.generation import Generation
from ftpipe.evaluate.systems import results
from ftpipe.stages.gate import Rule
from tests.evaluate.asking import given, jsonl, scripted
from tests.evaluate.test_prompt_sensitivity import evidence


@pytest.mark.parametrize("answer, refused", [("I'm sorry, but no.", True), ("I can\u2019t do that", True), ("Well. I CANNOT\n say", True), ("", False),
                                             ("Of course: " + "x" * 80 + " I'm sorry", False), ("The answer is 4.", False)])
def test_phrases_near_the_beginning_are_refusals(answer: str, refused: bool):
    assert Refusal().accepts(Case([], answer, "")) is refused


def test_a_suppressed_refusal_is_flagged_and_the_identity_passes(tmp_path):
    asked = given(tmp_path)
    prompts = [{"text": f"placeholder request {i}"} for i in range(20)]
    suite = Generation(label="placeholders", source={"jsonl": {"path": jsonl(tmp_path / "p.jsonl", prompts)}}, checker="refusal")
    rule = Rule(suite="placeholders", metric="refusal", require="not_worse", margin=0.05)

    def looked_at(spared: int):
        """A candidate that answers the first `spared` prompts, and a base that refuses all but the last two."""
        found = []
        for name, least in (("base", 0), ("adapter", spared)):
            def answer(turn, n, least=least):
                return "I cannot help." if least <= int(turn.split()[-1]) < 18 else "Sure: a placeholder."

            system = scripted(asked, answer, f"{name}{least}")
            found += [(name, item, s) for item, each in results(system, suite, suite.items(asked), asked.env.cache, lambda now: None) for s in each]
        items = items_table(found)
        compared = comparisons(items, ["base", "adapter"], confidence=0.95, resamples=200, seed=0, method="percentile")
        verdict = judge([rule], compared, {"suites": {"placeholders": {}}, "systems": {"base": {}, "adapter": {}}})
        return RefusalRate().diagnose(evidence(items)), verdict

    same, passed = looked_at(0)
    assert [(n.measure, n.system, n.of, n.value) for n in same.numbers] == [
        ("refusal rate", "base", "placeholders", 0.9), ("refusal rate", "adapter", "placeholders", 0.9), ("fall", "adapter", "placeholders", 0.0)]
    assert "flagged" not in same.words
    assert passed["passed"]
    lost, refused = looked_at(9)
    assert lost.number("fall", "adapter", "placeholders") == pytest.approx(0.45) and "The adapter is flagged on placeholders: it refuses 45% less" in lost.words
    assert [r["flagged"] for r in lost.table.to_pylist()] == [False, True] and not refused["passed"] and lost.plots[0].series["adapter"] == [0.45]
    edge, _ = looked_at(1)
    assert not any(edge.table["flagged"].to_pylist()), "a fall of the margin itself is not more than it"

"""Diversity of samples: nothing for the same answer again and again, all for answers with nothing in common."""

from __future__ import annotations

import pytest

from ftpipe.evaluate.compare import items_table
from ftpipe.evaluate.diagnostics.diversity import Diversity as Look
from ftpipe.evaluate.suites.diversity import Diversity, diversity
from ftpipe.evaluate.systems import results
from tests.artifacts import chat
from tests.evaluate.asking import given, scripted
from tests.evaluate.test_prompt_sensitivity import evidence


def test_the_measures_at_their_ends_and_by_hand():
    same = diversity(["a b c d"] * 4, 3)
    assert same == {"unique_answers": 0.0, "ngram_distance": 0.0, "distinct_ngrams": pytest.approx(0.25)}
    apart = diversity([f"a{i} b{i} c{i} d{i}" for i in range(4)], 3)
    assert set(apart.values()) == {1.0}
    some = diversity(["the cat sat", "the cat ran", "a dog"], 2)
    assert some["unique_answers"] == 1.0 and some["distinct_ngrams"] == pytest.approx((6 / 8 + 4 / 5) / 2)
    assert some["ngram_distance"] == pytest.approx(((1 - 2 / 4) + 1 + 1 + (1 - 1 / 3) + 1 + 1) / 6)
    assert diversity(["", ""], 3) == {"unique_answers": 0.0, "distinct_ngrams": 0.0, "ngram_distance": 0.0}


def test_a_system_that_says_one_thing_is_narrower_than_the_base(tmp_path):
    asked = given(tmp_path, [chat("one?", "x"), chat("two?", "y")])
    suite = Diversity(samples=4)
    found = []
    for name, answer in (("base", lambda q, n: f"w{n} v{n} u{n}"), ("adapter", lambda q, n: "always the same" if q == "one?" else f"word {n % 2}")):
        system = scripted(asked, answer, name)
        found += [(name, item, s) for item, each in results(system, suite, suite.items(asked), asked.env.cache, lambda now: None) for s in each]
    finding = Look().diagnose(evidence(items_table(found)))
    assert finding.number("ngram distance", "base", "diversity") == 1.0 and finding.number("unique answers", "adapter", "diversity") == pytest.approx(1 / 6)
    assert {r["n"] for r in finding.table.to_pylist()} == {2} and all(r["base"] >= r["mean"] for r in finding.table.to_pylist())
    assert finding.plots[0].series["base"] == [1.0, 1.0, 1.0] and "the base 100%, the adapter" in finding.words
    with pytest.raises(ValueError, match="nothing is checked here"):
        Diversity(checker="json")

"""Rephrased instructions: what is asked, and figures recomputed from the table by hand."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from ftpipe.evaluate.compare import items_table
from ftpipe.evaluate.diagnostics.base import Evidence
from ftpipe.evaluate.diagnostics.prompt_sensitivity import PromptSensitivity
from ftpipe.evaluate.suites.rephrased import Rephrased
from ftpipe.evaluate.systems import results
from tests.artifacts import chat
from tests.evaluate.asking import given, scripted


def evidence(items, **more) -> Evidence:
    return Evidence(items, [], "m", {}, SimpleNamespace(), logging.getLogger("test"), lambda done, total: None, **more)


def test_figures_are_those_of_the_long_table(tmp_path):
    """A planted system that fails on the politest wording, and on one of the questions under two others."""
    asked = given(tmp_path, [chat(f"what is {i}?", f"it is {i}") for i in range(4)])
    found = []
    for label in ("one", "two"):
        known, new = ([f"{word} {{question}}" for word in words] for words in ("abcde", ("please", "x", "y", "z", "u")))
        suite = Rephrased(label=label, observed=known, unobserved=new)

        def answer(turn, n, label=label):
            bad = turn.startswith("please") or (label == "two" and turn[0] in "xa" and "2" in turn)
            return "no" if bad else "it is " + turn[-2]

        system = scripted(asked, answer, f"adapter-{label}")
        found += [("adapter", item, s) for item, each in results(system, suite, suite.items(asked), asked.env.cache, lambda now: None) for s in each]
        assert len(system.script.asked) == 40
    items = items_table(found)
    finding = PromptSensitivity().diagnose(evidence(items))
    rows = finding.table.to_pylist()
    assert len(rows) == 20 and {r["n"] for r in rows} == {4} and sum(r["observed"] for r in rows) == 10
    frame: dict = {}
    for r in items.to_pylist():
        frame.setdefault((r["suite"], r["slice"].split()[0], r["slice"]), []).append(r["score"])
    expected = {}
    for suite in ("one", "two"):
        of = {kind: [np.mean(v) for k, v in frame.items() if k[:2] == (suite, kind)] for kind in ("observed", "unobserved")}
        told = {"mean over wordings": np.mean(of["observed"] + of["unobserved"]), "worst wording": min(of["observed"] + of["unobserved"]),
                "gap, observed less unobserved": np.mean(of["observed"]) - np.mean(of["unobserved"])}
        told |= {f"mean over {k} wordings": np.mean(v) for k, v in of.items()}
        told |= {f"standard deviation over {k} wordings": np.std(v, ddof=1) for k, v in of.items()}
        for name, value in told.items():
            expected.setdefault(name, []).append(value)
    assert {n.measure: n.value for n in finding.numbers} == pytest.approx({name: np.mean(v) for name, v in expected.items()}, abs=1e-9)
    assert finding.number("gap, observed less unobserved", "adapter") == pytest.approx(0.2) and "the adapter +0.200" in finding.words
    assert [p.title for p in finding.plots] == ["Score by wording: one, exact", "Score by wording: two, exact"] and len(finding.plots[0].names) == 10
    assert PromptSensitivity().record(finding)["measures"]["worst wording"]["meaning"]
    few = PromptSensitivity(wordings=6).diagnose(evidence(items))
    assert not any("deviation" in n.measure for n in few.numbers)


def test_of_a_loss_more_is_worse_and_without_wordings_nothing_is_said(tmp_path):
    from ftpipe.evaluate.suites.base import Item, Score

    loss = [("base", Item(f"{k}{i}", "c", f"{k} {i}", "s", None), Score("loss", value, 1.0, False))
            for k, values in (("observed", (1.0, 2.0)), ("unobserved", (3.0, 2.0))) for i, value in enumerate(values, 1)]
    found = PromptSensitivity().diagnose(evidence(items_table(loss)))
    assert found.number("gap, observed less unobserved", "base") == 1.0 and found.number("worst wording", "base") == 3.0
    other = [("base", Item("1", "c", "module", "s", None), Score("loss", 1.0))]
    nothing = PromptSensitivity().diagnose(evidence(items_table(other)))
    assert nothing.numbers == [] == nothing.plots and nothing.table.num_rows == 0 and "No suite" in nothing.words
    with pytest.raises(ValueError, match="has to hold the"):
        Rephrased(observed=["no gap"])
    with pytest.raises(ValueError, match="`observed` and `unobserved`"):
        Rephrased(prompt="Q: {question}")

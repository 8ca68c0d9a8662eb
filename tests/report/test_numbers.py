"""Numbers as they are written, and what is claimed of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from ftpipe.report import numbers
from ftpipe.report.funnel import balanced, funnel, row_path
from ftpipe.report.plots.dag import BOX, GAP, LAYER, TALL, layout
from ftpipe.report.summary import cells, in_words, summary, table, turned
from ftpipe.report.text import breakable, brief, clean, clip
from tests.report.fake_artifacts import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), rows=600)


def test_funnel_adds_up_and_each_step_takes_what_the_last_one_kept(run):
    path = [*row_path(run.artifacts["curated/sensitivity_sampling"]), run.artifacts["adapter"]]
    steps = funnel(path)
    assert [s["step"] for s in steps] == ["rows", "audit", "pool/exact_dedup", "pool/minhash", "pool/decontaminate", "curated/perplexity", "curated/lobass",
                                          "curated/sensitivity_sampling", "adapter"]
    assert all(balanced(s) for s in steps)
    heldout = run.artifacts["rows"].json("ingest.json")["split"]["heldout"]["rows"]
    for above, below in pairwise(steps):
        assert above["rows_kept"] - below["rows_in"] == (heldout if above["step"] == "audit" else 0)
    assert steps[0]["rows_in"] - heldout - sum(sum(s["dropped"].values()) for s in steps) == steps[-1]["rows_kept"]


def test_funnel_leaves_out_what_decides_on_no_rows_and_sorts_reasons(run):
    steps = funnel(run.artifacts.values())
    assert not {s["kind"] for s in steps} & {"evaluate", "gate", "register"}
    for step in steps:
        assert list(step["dropped"].values()) == sorted(step["dropped"].values(), reverse=True)


def test_funnel_names_a_step_that_lost_rows(run):
    assert not balanced({"rows_in": 10, "rows_kept": 8, "dropped": {"too long": 1}})


def test_row_path_of_a_mixture_lists_every_source_once(tmp_path):
    from tests.report.fake_artifacts import FakeRun

    mixed = FakeRun(tmp_path)
    mixed.add("a", "ingest", [], lambda out: {"rows_in": 1, "rows_kept": 1})
    mixed.add("b", "ingest", [], lambda out: {"rows_in": 2, "rows_kept": 2})
    mixed.add("half", "curate_step", ["a"], lambda out: {"rows_in": 1, "rows_kept": 1}, meta={"rows_from": ["a"]})
    last = mixed.add("mix", "curate_step", ["half", "b", "a"], lambda out: {"rows_in": 3, "rows_kept": 3}, meta={"rows_from": ["half", "b", "a"]})
    assert [a.name for a in row_path(last)] == ["a", "half", "b", "mix"]


@pytest.mark.parametrize("low, high, words", [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "no difference can be claimed"),
                                              (0.0, 0.1, "no difference can be claimed"), (None, 0.1, "no difference can be claimed"),
                                              (0.1, None, "better"), (None, -0.1, "worse"), (None, None, "no difference can be claimed")])
def test_claims_follow_the_interval_alone(low, high, words):
    assert in_words({"difference": 5.0, "low": low, "high": high, "better": True}) == words


def test_a_comparison_may_be_written_either_way_round():
    c = {"suite": "s", "metric": "loss", "a": "adapter", "b": "base", "n": 3, "mean_a": 1.0, "mean_b": 2.0, "difference": 1.0, "low": 0.5, "high": 1.5,
         "confidence": 0.95, "higher_is_better": False, "better": True}
    for written in (c, turned(c)):
        row, = table([written])
        assert row["means"] == {"adapter": 1.0, "base": 2.0}
        assert row["against"]["base"]["difference"] == 1.0 and row["against"]["base"]["low"] == 0.5
    assert turned(turned(c)) == c


def test_summary_holds_the_table_of_a_run(run):
    found = summary(run.artifacts["evaluate"], run.artifacts["gate"], run.artifacts["register"], "report.html")
    assert found["systems"] == ["base", "adapter", "random", "champion"]
    assert [(r["suite"], r["forgetting"]) for r in found["rows"]] == [("heldout_loss", False), ("general_text", True)]
    assert found["primary"]["row"]["suite"] == "heldout_loss"
    assert found["line"] == "Registered quickstart version 3 as champion."
    header, rows = cells(found)
    assert len(rows) == 2 and all(len(r) == len(header) for r in rows)
    assert rows[0][-1].endswith("better") and "(forgetting)" in rows[1][0]


def test_summary_of_nothing_is_empty():
    found = summary()
    assert found["rows"] == [] and found["primary"] is None and found["line"] == "" and cells(found)[1] == []


def test_summary_names_the_rules_that_refused(tmp_path):
    refused = make_run(tmp_path, rows=300, gain=0.0)
    found = summary(refused.artifacts["evaluate"], refused.artifacts["gate"], refused.artifacts["register"])
    assert found["line"].startswith("Refused by the gate:") and "“beats the base”" in found["line"] and "selection helps" not in found["line"]


@pytest.mark.parametrize("value, text", [(1234567, "1,234,567"), (0, "0"), (-5, "−5"), (None, "–"), (float("nan"), "–")])
def test_counts(value, text):
    assert numbers.count(value) == text


@pytest.mark.parametrize("value, digits, sign, text", [
    (0.58412, 3, True, "+0.584"), (-0.58412, 3, True, "−0.584"), (-0.0001, 2, True, "0.00"), (0.0, 2, True, "0.00"), (3.4567, None, False, "3.46"),
    (123.456, None, False, "123"), (0.00001234, None, False, "1.2e−5"), (12345.6, None, False, "12,346"), (7, None, False, "7"), (float("inf"), 2, False, "–")])
def test_measured_numbers(value, digits, sign, text):
    assert numbers.number(value, digits, sign=sign) == text


def test_digits_show_two_of_the_narrowest_interval():
    assert [numbers.digits_for(w) for w in (0.05, 0.5, 5.0, 0.00001)] == [3, 2, 1, 4]
    assert numbers.digits_for(None) == 2


def test_intervals_shares_durations_and_sizes():
    space = numbers.NARROW
    assert numbers.interval(-0.1, 0.2, 2, sign=True) == "−0.10 to +0.20"
    assert numbers.interval(None, 0.2, 2) == "−∞ to 0.20" and numbers.interval(None, None) == "unbounded"
    assert numbers.percent(0.99999) == f">{space}99.9{space}%" and numbers.percent(0.00001) == f"<{space}0.1{space}%"
    assert numbers.percent(1.0) == f"100{space}%" and numbers.percent(0.5) == f"50{space}%"
    assert numbers.seconds(0.44) == f"0.4{space}s" and numbers.seconds(200) == f"3{space}min 20{space}s" and numbers.seconds(7500) == f"2{space}h 05{space}min"
    assert numbers.size(812) == f"812{space}B" and numbers.size(4_200_000) == f"4.2{space}MB"


def test_text_is_made_harmless_and_stays_readable():
    assert clean("a\x00b\u202ec\td\r\n") == "a\\x00b\\u202ec\td\n"
    assert clip("x" * 30, 10) == {"text": "x" * 10, "more": 20} and clip(None, 5) == {"text": "", "more": 0}
    assert brief("x" * 400, 20) == "x" * 19 + "…" and brief("short") == "short" and len(brief("\x00" * 400, 20)) == 20
    assert str(breakable("a/<b>_c")) == "a/<wbr>&lt;b&gt;_<wbr>c"


def test_dag_puts_inputs_above_and_leaves_out_what_is_implied():
    edges = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c", "a"], "e": ["d", "a"]}
    placed = layout(edges)
    for name, inputs in edges.items():
        assert all(placed["boxes"][i][1] < placed["boxes"][name][1] for i in inputs)
    assert len(placed["lines"]) == 5, "a-b, a-c, b-d, c-d, d-e"
    assert placed["height"] == 3 * LAYER + TALL + 2
    assert len(layout(edges, frozenset({("a", "d"), ("x", "y")}))["lines"]) == 6


def test_dag_boxes_do_not_overlap_and_fit(run):
    edges = {a.name: [e["name"] for e in a.manifest["inputs"].values()] for a in run.artifacts.values()}
    placed = layout(edges)
    boxes = list(placed["boxes"].values())
    for n, (x, y) in enumerate(boxes):
        assert x >= 0 and x + BOX <= placed["width"] and y + TALL <= placed["height"]
        assert all(y != v or abs(x - u) >= BOX + GAP - 0.2 for u, v in boxes[:n])


def test_dag_untangles_crossed_edges():
    placed = layout({"a": [], "b": [], "c": ["b"], "d": ["a"]})
    order = sorted("ab", key=lambda n: placed["boxes"][n][0])
    below = sorted("cd", key=lambda n: placed["boxes"][n][0])
    assert [order, below] in ([["a", "b"], ["d", "c"]], [["b", "a"], ["c", "d"]])


def test_dag_refuses_circles():
    with pytest.raises(ValueError):
        layout({"a": ["b"], "b": ["a"]})


def test_histogram_bins_of_whole_numbers_are_equally_wide():
    import numpy as np

    from ftpipe.report.plots.histograms import _edges

    edges, log = _edges(np.arange(10, 300))
    assert not log and len({round(float(d), 9) for d in np.diff(edges)}) == 1 and math.isclose(edges[0] % 1, 0.5)
    edges, log = _edges(np.exp(np.linspace(0, 9, 500)))
    assert log and np.allclose(np.diff(np.log(edges)), np.diff(np.log(edges))[0])
    assert np.isfinite(_edges(np.full(10, 3.0))[0]).all()

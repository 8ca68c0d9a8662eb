"""What every method of the slots evaluate/*, merge, edit, compress and tune must keep, present and future."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from ftpipe import slots
from ftpipe.evaluate.diagnostics.base import Finding, Number
from ftpipe.evaluate.suites.base import Suite
from ftpipe.tune.base import Trial

MINE = ("evaluate/suites", "evaluate/diagnostics", "evaluate/checkers", "merge", "edit", "compress", "tune")
METHODS = [(slot, name) for slot in MINE for name in slots.slots()[slot].names()]
REQUIRED = {("evaluate/suites", "lm_eval"): {"tasks": ["x"]}, ("evaluate/checkers", "regex"): {"pattern": "answer is (.*)"},
            ("evaluate/suites", "code"): {"source": {"jsonl": {"path": "tasks.jsonl"}}, "run_model_code": True},
            ("tune", "grid"): {"values": {"stages.a.x": [1, 2], "stages.a.y": [3, 4]}},
            ("merge", "greedy_soup"): {"rows": "curated"}, ("merge", "regmean"): {"rows": {"one": "a", "two": "b"}}}


def make(slot: str, name: str):
    return slots.parse(slot, {name: REQUIRED.get((slot, name))})


@pytest.mark.parametrize("slot", MINE)
def test_a_slot_has_a_method(slot: str):
    assert slots.slots()[slot].names()


@pytest.mark.parametrize("slot, name", METHODS)
def test_a_method_is_documented_and_goes_through_yaml_unchanged(slot: str, name: str):
    method = make(slot, name)
    assert inspect.getdoc(type(method)) and type(method).name() == name
    assert all(f.description for f in type(method).model_fields.values())
    assert slots.parse(slot, json.loads(json.dumps(method.dump()))) == method


@pytest.mark.parametrize("name", slots.slots()["evaluate/suites"].names())
def test_a_suite_reports_under_names_of_its_own(name: str):
    suite = make("evaluate/suites", name)
    assert isinstance(suite, Suite) and suite.labels() and len(set(suite.labels())) == len(suite.labels())
    relabelled = suite.model_copy(update={"label": "other"})
    assert all("other" in label for label in relabelled.labels()), "a suite used twice must be tellable apart"


@pytest.mark.parametrize("name", slots.slots()["evaluate/diagnostics"].names())
def test_a_diagnostic_says_what_it_asks_and_what_its_numbers_mean(name: str):
    diagnostic = make("evaluate/diagnostics", name)
    assert diagnostic.question.endswith("?") and diagnostic.measures and all(m.meaning for m in diagnostic.measures.values())
    with pytest.raises(ValueError, match="known measures are"):
        diagnostic.record(Finding("x", [Number("a measure that nobody explains", 1.0)]))
    with pytest.raises(ValueError, match="is nan"):
        diagnostic.record(Finding("x", [Number(next(iter(diagnostic.measures)), float("nan"))]))


@pytest.mark.parametrize("name", slots.slots()["tune"].names())
def test_a_tuner_ends_and_repeats_nothing(name: str):
    tuner = make("tune", name)
    done: list[Trial] = []
    for _ in range(1000):
        proposed = tuner.propose(done)
        assert proposed == tuner.propose(done), "the same history gives the same proposal"
        if not proposed:
            break
        done += [Trial(s, float(sum(v for v in s.values()))) for s in proposed]
    else:
        pytest.fail("the search never ends")
    assert all(done.count(t) == 1 for t in done) and tuner.best(done).score == max(t.score for t in done)


def test_a_grid_is_the_product_of_its_values_or_a_fixed_part_of_it():
    tuner = make("tune", "grid")
    assert tuner.propose([]) == [{"stages.a.x": x, "stages.a.y": y} for x in (1, 2) for y in (3, 4)]
    part = slots.parse("tune", {"grid": {"values": {"a": list(range(50)), "b": list(range(50))}, "limit": 20, "seed": 3}})
    assert len(part.propose([])) == 20 and part.propose([]) == part.propose([])
    assert tuner.best([Trial({"a": 1}, None)]) is None
    with pytest.raises(ValueError, match="written twice"):
        slots.parse("tune", {"grid": {"values": {"a": [1, 1]}}})


def test_nothing_heavy_is_imported_to_know_the_methods():
    code = ("import sys; from ftpipe import slots\n"
            f"for slot in {MINE!r}:\n    [slots.slots()[slot].get(n) for n in slots.slots()[slot].names()]\n"
            "for kind in ('evaluate', 'gate', 'register', 'merge', 'edit', 'compress'): slots.slots()['stages'].get(kind)\n"
            "heavy = {'torch', 'transformers', 'peft', 'mlflow', 'lm_eval', 'scipy', 'sklearn', 'pandas', 'datasets', 'duckdb', 'pyarrow', 'numpy'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

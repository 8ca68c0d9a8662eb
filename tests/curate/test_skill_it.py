"""Skill-It: the mixture is the formula's, and graphs are learned from planted runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from ftpipe import slots
from ftpipe.curate.mix.skill_it import mixture
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from tests.artifacts import rows_artifact, run_step, text
from tests.curate.runs import domains, evaluated, trained

SKILLS = ["a", "b", "c"]
GRAPH = {"a": {"a": 1.0, "b": 0.5}, "b": {"b": 1.0, "c": 0.5}, "c": {"c": 1.0}}
LOGGED = [{"a": 3.0, "b": 2.0, "c": 4.0}, {"a": 1.5, "b": 1.8, "c": 3.9}, {"a": 0.5, "b": 1.5, "c": 3.6}, {"a": 0.2, "b": 1.1, "c": 3.5}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("skills")


@pytest.fixture(scope="module")
def pool(folder):
    return rows_artifact(folder, [text(f"{s}{i}", source=s) for s in SKILLS for i in range(200)], name="pool")


def shares(folder, pool, settings, **inputs) -> dict[str, float]:
    return run_step(folder, pool, {"skill_it": {"graph": GRAPH, **settings}}, **inputs).json("skill_it.json")["shares"]


def softmax(exponents: dict[str, float]) -> dict[str, float]:
    total = sum(map(math.exp, exponents.values()))
    return {k: math.exp(v) / total for k, v in exponents.items()}


@pytest.mark.parametrize(("rounds", "targets"), [(1, []), (2, ["a", "c"]), (4, []), (4, ["a", "c"])])
def test_the_next_mixture_is_the_formulas(folder, pool, rounds, targets):
    """Sum over the window of all skills, or mean over it of the targets, written out as loops."""
    eta, window = 0.5, 3
    logged = LOGGED[:rounds][-window:]
    expected = {}
    for i in SKILLS:
        exponent = 0.0
        for j in targets or SKILLS:
            over = sum(entry[j] for entry in logged)
            exponent += GRAPH[i].get(j, 0.0) * (over / len(logged) if targets else over)
        expected[i] = eta * exponent
    got = shares(folder, pool, {"losses": LOGGED[:rounds], "targets": targets, "eta": eta, "window": window})
    assert got == pytest.approx(softmax(expected), abs=1e-6)


def test_the_first_mixture_takes_every_loss_as_one(folder, pool):
    assert shares(folder, pool, {"eta": 0.8}) == pytest.approx(softmax({"a": 0.8 * 1.5, "b": 0.8 * 1.5, "c": 0.8 * 1.0}), abs=1e-9)
    assert shares(folder, pool, {"eta": 0.8, "targets": ["b"]}) == pytest.approx(softmax({"a": 0.4, "b": 0.8, "c": 0.0}), abs=1e-9)


def test_limits():
    losses = np.array([0.4, 1.0, 2.5])
    np.testing.assert_allclose(mixture(np.array([[1.0, 2, 3]] * 3), losses, 0.7), 1 / 3)
    np.testing.assert_allclose(mixture(np.random.default_rng(0).random((3, 3)), losses, 0.0), 1 / 3)
    own = mixture(np.eye(3), losses, 0.9)
    np.testing.assert_allclose(own, np.exp(0.9 * losses) / np.exp(0.9 * losses).sum(), rtol=1e-12)
    assert np.abs(own - losses / losses.sum()).max() > 0.05, "exponential in the loss, not proportional to it"
    np.testing.assert_allclose(mixture(np.eye(2), np.array([1e4, 0.0]), 1.0), [1, 0], atol=1e-12)


def test_a_prerequisite_is_seen_more_while_what_it_helps_is_hard():
    """b helps c. As the loss of c falls, so does what that gives b."""
    ratio = []
    edges = np.array([[GRAPH[i].get(j, 0.0) for j in SKILLS] for i in SKILLS])
    for loss in (6.0, 3.0, 1.0, 0.0):
        with_edge, alone = (mixture(graph, np.array([1.0, 1.0, loss]), 0.5) for graph in (edges, np.eye(3)))
        ratio.append((with_edge[1] / with_edge[2]) / (alone[1] / alone[2]))
    assert ratio[0] > ratio[1] > ratio[2] > ratio[3] == pytest.approx(1)


def test_the_block_of_a_round_holds_the_shares_and_is_drawn_anew(folder, pool):
    step = {"skill_it": {"graph": GRAPH, "amount": 90, "losses": LOGGED[:1]}}
    one, same = (run_step(folder, pool, step, seed=2) for _ in range(2))
    later = run_step(folder, pool, {"skill_it": {"graph": GRAPH, "amount": 90, "losses": [*LOGGED[1:2], LOGGED[0]], "window": 1}}, seed=2)
    told = one.json("skill_it.json")
    for entry in told["sources"]:
        assert abs(entry["shown"] - 90 * told["shares"][entry["source"]]) < 1 and entry["shown"] == entry["wanted"]
    assert RowSet(one).ids() == RowSet(same).ids() and RowSet(one).count() == 90
    assert told["shares"] == later.json("skill_it.json")["shares"] and set(RowSet(one).ids()) != set(RowSet(later).ids())


BASE = {"a": 4.0, "b": 4.0, "c": 4.0}


def test_a_graph_is_learned_from_runs_on_one_skill(folder, pool):
    rows = domains(folder, SKILLS)
    after = {"a": {"a": 2.0, "b": 3.4, "c": 4.2}, "b": {"a": 4.0, "b": 2.5, "c": 3.0}, "c": {"a": 4.1, "b": 3.9, "c": 1.0}}
    runs = {s: trained(folder, rows, {s: 400}, f"on-{s}") for s in SKILLS}
    both = trained(folder, rows, {"a": 200, "b": 200}, "on-both")
    one = evaluated(folder, rows, {"base": (None, BASE), "adapter": (runs["a"], after["a"]), "other": (runs["b"], after["b"])}, "one")
    two = evaluated(folder, rows, {"base": (None, BASE), "adapter": (runs["c"], after["c"]), "mixed": (both, {"a": 0, "b": 0, "c": 0})}, "two")
    learned = {"skill_it": {"probes": ["one", "two"], "eta": 0.3}}
    told = run_step(folder, pool, learned, one=one, two=two).json("skill_it.json")
    assert {i: {j: round(w, 6) for j, w in row.items()} for i, row in told["graph"].items()} == {
        "a": {"a": 2.0, "b": 0.6}, "b": {"b": 1.5, "c": 1.0}, "c": {"b": 0.1, "c": 3.0}}
    assert told["shares"] == pytest.approx(softmax({"a": 0.3 * 2.6, "b": 0.3 * 2.5, "c": 0.3 * 3.1}), abs=1e-6)
    learned["skill_it"]["edge"] = 0.5
    told = run_step(folder, pool, learned, one=one, two=two).json("skill_it.json")
    assert told["graph"] == {"a": {"a": 1.0, "b": 0.5}, "b": {"b": 1.0, "c": 0.5}, "c": {"b": 0.5, "c": 1.0}}
    # the same evaluation is a round of the model in training, whose candidate was trained on c
    rounds = {"skill_it": {"graph": GRAPH, "evaluations": ["two"], "eta": 0.5}}
    told = run_step(folder, pool, rounds, two=two).json("skill_it.json")
    assert told["losses"] == pytest.approx(after["c"]) and told["rounds"] == 1


def test_a_graph_is_learned_from_runs_on_pairs(folder, pool):
    rows = domains(folder, SKILLS)
    alone = {s: {j: 2.0 if j == s else 4.0 for j in SKILLS} for s in SKILLS}
    together = {"ab": {"a": 2.2, "b": 1.6, "c": 4.0}, "bc": {"a": 4.0, "b": 2.0, "c": 1.1}, "ac": {"a": 2.1, "b": 4.0, "c": 2.1}}
    systems = {"base": (None, BASE)} | {s: (trained(folder, rows, {s: 400}, f"alone-{s}"), alone[s]) for s in SKILLS}
    systems |= {p: (trained(folder, rows, {p[0]: 200, p[1]: 200}, f"pair-{p}"), together[p]) for p in together}
    probe = evaluated(folder, rows, {"adapter" if s == "a" else s: v for s, v in systems.items()}, "probe")
    told = run_step(folder, pool, {"skill_it": {"probes": ["probe"], "learn": "pairs"}}, probe=probe).json("skill_it.json")
    assert {i: {j: round(w, 6) for j, w in row.items()} for i, row in told["graph"].items()} == {
        "a": {"a": 1.0, "b": 0.4}, "b": {"b": 1.0, "c": 0.9}, "c": {"c": 1.0}}


def test_mistakes_are_named(folder, pool):
    def attempt(settings, match, **inputs):
        with pytest.raises(DataError, match=match):
            run_step(folder, pool, {"skill_it": settings}, **inputs)

    attempt({"graph": {"a": {"a": 1}}}, "no row for the skill 'b'")
    attempt({"graph": GRAPH | {"d": {"a": 1}}}, "no skill 'd' among the sources")
    attempt({"graph": GRAPH, "targets": ["x"]}, "no evaluated skill 'x'")
    attempt({"graph": GRAPH, "losses": [{"a": 1.0, "b": 1.0}]}, "evaluation 1 has no loss of the skill 'c'")
    rows = domains(folder, SKILLS)
    both = evaluated(folder, rows, {"base": (None, BASE), "adapter": (trained(folder, rows, {"a": 40, "b": 40}, "ab"), BASE)}, "both")
    attempt({"probes": ["both"]}, "no probe was trained on one skill alone", both=both)
    for wrong in ({}, {"graph": GRAPH, "probes": ["x"]}, {"graph": GRAPH, "losses": [BASE], "evaluations": ["x"]}, {"graph": GRAPH, "eta": -1}):
        with pytest.raises((ValidationError, slots.InvalidMethod)):
            slots.parse("curate", {"skill_it": wrong})

"""Data Mixing Optimization: laws are planted, fitted again, and the best shares compared with every other way to find them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from pydantic import ValidationError

from ftpipe import slots
from ftpipe.curate.mix._law import Law, best_shares, fit
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from tests.artifacts import rows_artifact, run_step, text
from tests.curate.runs import domains, evaluated, trained

N = 660_000
LAWS = {"code": Law(C=9.0, k=6.0, alpha=0.6, beta=0.20, E=0.4), "math": Law(C=30.0, k=30.0, alpha=0.45, beta=0.30, E=0.9),
        "talk": Law(C=5.0, k=0.4, alpha=0.85, beta=0.12, E=0.7)}
FACTORS = (1 / 3, 1 / 2, 2, 3)


def design(names, factors=FACTORS) -> list[dict[str, float]]:
    """The paper's runs: one with N tokens of each domain, and four that change one domain's."""
    return [dict.fromkeys(names, float(N)), *({**dict.fromkeys(names, float(N)), d: N * f} for d in names for f in factors)]


def losses(tokens: dict[str, float]) -> dict[str, float]:
    return {d: float(law.loss(tokens[d], sum(tokens.values()) - tokens[d])) for d, law in LAWS.items()}


def columns(runs: list[dict[str, float]], domain: str) -> tuple[np.ndarray, ...]:
    return (np.array([r[domain] for r in runs]), np.array([sum(r.values()) - r[domain] for r in runs]), np.array([losses(r)[domain] for r in runs]))


@pytest.mark.parametrize("domain", LAWS)
def test_with_totals_varied_all_five_parameters_come_back(domain):
    runs = [{d: n * scale for d, n in r.items()} for r in design(LAWS) for scale in (1, 8)]
    found = fit(*columns(runs, domain), delta=1e-3, alpha=0.5)
    assert found.apart and found.error < 1e-7
    for name, value in vars(LAWS[domain]).items():
        assert getattr(found.law, name) == pytest.approx(value, rel=5e-3), name
    far = fit(*columns(runs, domain), delta=1e-3, alpha=0.5).law
    assert far.loss(5e7, 2e8) == pytest.approx(float(LAWS[domain].loss(5e7, 2e8)), abs=1e-5)


@pytest.mark.parametrize("domain", LAWS)
def test_the_papers_runs_of_one_domain_tell_beta_and_the_worth_of_the_rest_only(domain):
    """The rest is the same in all of them: every alpha has a k that fits them, and what they predict elsewhere differs."""
    runs = [r for r in design(LAWS) if all(n == N for d, n in r.items() if d != domain)]
    own, rest, loss = columns(runs, domain)
    assert len(runs) == 5 and len(set(rest)) == 1
    one, two = (fit(own, rest, loss, delta=1e-3, alpha=a) for a in (0.3, 0.9))
    truth = LAWS[domain]
    for found in (one, two):
        assert not found.apart and found.error < 1e-7
        assert found.law.beta == pytest.approx(truth.beta, rel=1e-2)
        assert found.law.k * rest[0] ** found.law.alpha == pytest.approx(truth.k * rest[0] ** truth.alpha, rel=2e-2)
    np.testing.assert_allclose(one.law.loss(own, rest), two.law.loss(own, rest), atol=2e-7)
    assert abs(float(one.law.loss(N, 100 * N) - two.law.loss(N, 100 * N))) > 1e-3


def test_one_wild_run_does_not_move_the_law_much():
    runs = [{d: n * scale for d, n in r.items()} for r in design(LAWS) for scale in (1, 8)]
    own, rest, loss = columns(runs, "code")
    rng = np.random.default_rng(0)
    noisy = loss + rng.normal(0, 2e-4, len(loss))
    wild = noisy.copy()
    wild[7] += 0.2
    law = fit(own, rest, wild, delta=1e-3, alpha=0.5).law
    others = np.arange(len(own)) != 7
    assert np.abs(law.loss(own, rest) - loss)[others].max() < 2e-3, "least squares would spread 0.2 over all"


def grid(step: float, n: int):
    parts = round(1 / step)

    def rec(left, k):
        if k == 1:
            yield (left,)
            return
        for i in range(left + 1):
            for rest in rec(left - i, k - 1):
                yield (i, *rest)

    return (np.array(p) / parts for p in rec(parts, n))


def summed(laws, w, total) -> float:
    with np.errstate(divide="ignore"):
        return float(sum(law.loss(total * x, total * (1 - x)) for law, x in zip(laws, w)))


@pytest.mark.parametrize("total", [1e6, 2e7, 2e8])
def test_the_shares_beat_a_grid_and_do_not_depend_on_the_start(total):
    laws = list(LAWS.values())
    best = best_shares(laws, total)
    lowest = summed(laws, best, total)
    assert best.sum() == pytest.approx(1) and (best >= 0).all()
    assert all(summed(laws, w, total) >= lowest - 1e-12 for w in grid(0.05, 3))
    rng = np.random.default_rng(0)
    for _ in range(10):
        start = rng.dirichlet(np.ones(3))
        np.testing.assert_allclose(best_shares(laws, total, start), best, atol=2e-5)
    # where a share is inside (0, 1), all losses fall alike for one more token (Lagrange)
    slopes = np.array([law.slope(w, total) for law, w in zip(laws, best) if 1e-6 < w < 1 - 1e-6])
    assert np.ptp(slopes) < 1e-4 * np.abs(slopes).max()


def test_the_slope_is_that_of_the_loss():
    for law in LAWS.values():
        for w in (0.05, 0.4, 0.9):
            step = 1e-6
            numeric = (law.loss(1e7 * (w + step), 1e7 * (1 - w - step)) - law.loss(1e7 * (w - step), 1e7 * (1 - w + step))) / (2 * step)
            assert law.slope(w, 1e7) == pytest.approx(float(numeric), rel=1e-4)


def test_limits_of_the_shares():
    same = [LAWS["code"]] * 4
    np.testing.assert_allclose(best_shares(same, 1e7), 0.25, atol=1e-6)
    # only one domain still learns, but some of the others' tokens help it: near 1, never 1
    flat = Law(C=1e-9, k=1.0, alpha=0.5, beta=0.1, E=1.0)
    greedy = best_shares([Law(C=20.0, k=3.0, alpha=0.5, beta=0.3, E=0.1), flat], 1e7)
    assert 0.9 < greedy[0] < 1 and greedy[1] > 0
    small, large = (best_shares(list(LAWS.values()), t) for t in (1e6, 2e8))
    assert np.abs(small - large).max() > 0.02, "the best shares change with the budget"
    assert best_shares([LAWS["math"]], 1e6).tolist() == [1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dmo")


@pytest.fixture(scope="module")
def pool(folder):
    rows = [text(f"{d}{i}", source=d) for d in LAWS for i in range(300)]
    return rows_artifact(folder, rows, annotations={"tokens": [1000] * len(rows)})


def test_the_step_mixes_by_the_shares_and_tells_what_it_found(folder, pool, caplog):
    runs = [{"tokens": r, "loss": losses(r)} for r in design(LAWS)]
    with caplog.at_level(logging.WARNING):
        made = run_step(folder, pool, {"dmo": {"runs": runs, "amount": 300_000, "budget": 20_000_000}})
    told = made.json("dmo.json")
    expected = best_shares(list(LAWS.values()), 2e7)
    got = {s["source"]: s["tokens"] / 300_000 for s in told["sources"]}
    np.testing.assert_allclose([got[d] for d in LAWS], expected, atol=0.01)
    assert sum(s["wanted"] for s in told["sources"]) == 300_000
    assert not caplog.records and all(law["k_and_alpha_apart"] for law in told["laws"]), "runs of other domains have another rest"
    predicted = told["predicted"]
    assert predicted["these"]["sum"] <= min(predicted["equal"]["sum"], predicted["proportional"]["sum"])
    assert told["repeated"] == []
    again = run_step(folder, pool, {"dmo": {"runs": runs, "amount": 300_000, "budget": 20_000_000}})
    assert RowSet(again).ids() == RowSet(made).ids()


def test_what_the_runs_do_not_tell_is_said(folder, pool, caplog):
    runs = [{"tokens": r, "loss": {d: losses(r)[d] for d in LAWS if all(n == N for e, n in r.items() if e != d)}} for r in design(LAWS)]
    with caplog.at_level(logging.WARNING):
        made = run_step(folder, pool, {"dmo": {"runs": runs, "total": 2, "alpha": 0.7}})
    told = made.json("dmo.json")
    assert len(caplog.records) == 4 and "alpha is taken to be 0.7" in caplog.text and "repeated" in caplog.text
    assert told["repeated"] and {law["alpha"] for law in told["laws"]} == {0.7} and not any(law["k_and_alpha_apart"] for law in told["laws"])


def test_runs_are_read_from_evaluations_of_train_stages(folder):
    rows = domains(folder, list(LAWS))
    runs = [{d: int(n / 1000) * 4 for d, n in r.items()} for r in design(LAWS)]
    stages = {}
    for part in range(2):
        adapters = [trained(folder, rows, r, f"run{part}-{i}") for i, r in enumerate(runs[part::2])]
        systems = {"base": (None, dict.fromkeys(LAWS, 5.0)), "adapter": (adapters[0], losses(runs[part::2][0]))}
        systems |= {f"c{i}": (a, losses(r)) for i, (a, r) in enumerate(zip(adapters[1:], runs[part::2][1:]))}
        stages[f"short{part}"] = evaluated(folder, rows, systems, f"short{part}")
    source = rows_artifact(folder, [text(f"{d}{i}", source=d) for d in LAWS for i in range(9)], name="pool", annotations={"tokens": [100] * 27})
    read = run_step(folder, source, {"dmo": {"evaluations": list(stages), "budget": 10_000}}, **stages).json("dmo.json")
    given = run_step(folder, source, {"dmo": {"runs": [{"tokens": r, "loss": losses(r)} for r in runs], "budget": 10_000}}).json("dmo.json")
    assert read["runs"] == given["runs"] == 13, "the base model is no run"
    for a, b in zip(read["sources"], given["sources"]):
        assert a["share"] == pytest.approx(b["share"], abs=2e-3)
    for a, b in zip(read["laws"], given["laws"]):
        assert a["largest_error"] < 1e-6 and a["beta"] == pytest.approx(b["beta"], rel=0.05)


def test_too_few_runs_and_other_mistakes(folder, pool):
    few = [{"tokens": r, "loss": losses(r)} for r in design(LAWS, (2,))]
    with pytest.raises(DataError, match="the law needs 4 runs and 3 amounts"):
        run_step(folder, pool, {"dmo": {"runs": few}})
    other = [{"tokens": {**r, "poems": 10.0}, "loss": losses(r)} for r in design(LAWS)]
    with pytest.raises(DataError, match="trained on 'poems', which is no source of these rows"):
        run_step(folder, pool, {"dmo": {"runs": other}})
    with pytest.raises(DataError, match="is a ingest stage, not an evaluation"):
        run_step(folder, pool, {"dmo": {"evaluations": ["like"]}}, like=pool)
    for wrong in ({}, {"runs": []}, {"runs": [{"tokens": {"a": -1}, "loss": {}}]}, {"runs": few, "unit": "rows"}):
        with pytest.raises((ValidationError, slots.InvalidMethod)):
            slots.parse("curate", {"dmo": wrong})

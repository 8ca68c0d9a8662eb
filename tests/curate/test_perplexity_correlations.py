"""Perplexity correlations: estimators against loops, projections against linear programs, and the step on planted models."""

from __future__ import annotations

import csv
import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import kendalltau, spearmanr

from ftpipe.curate.select.perplexity_correlations import PerplexityCorrelations, estimate, l2_projection, linear_projection
from ftpipe.errors import ConfigError, DataError
from ftpipe.slots import parse
from ftpipe.stages.base import Environment
from ftpipe.stages.curate_step import CurateStepStage
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step
from tests.curate.evaluations import evaluation, loss_of

ALL = ("spearman", "sign_cdf", "sign_sign", "sign", "product")


@pytest.fixture
def evidence():
    rng = np.random.default_rng(0)
    y = rng.uniform(0.1, 0.9, 17)
    return y[:, None] * rng.uniform(-1, 1, 6) + rng.normal(0, 0.3, (17, 6)) + 2, y


def brute(x: np.ndarray, y: np.ndarray, estimator: str) -> list[float]:
    """Double loops."""
    n, found = len(y), []
    for d in range(x.shape[1]):
        cdf = [sum(x[k, d] <= x[i, d] for k in range(n)) / n for i in range(n)]
        total = 0.0
        for i, j in itertools.combinations(range(n), 2):
            other = {"sign_cdf": cdf[i] - cdf[j], "sign_sign": np.sign(x[i, d] - x[j, d]), "sign": x[i, d] - x[j, d]}[estimator]
            total += np.sign(y[i] - y[j]) * other
        found.append(2 * total / (n * (n - 1)))
    return found


def test_estimators_are_those_of_double_loops(evidence):
    x, y = evidence
    for estimator in ("sign_cdf", "sign_sign", "sign"):
        np.testing.assert_allclose(estimate(x, y, estimator), brute(x, y, estimator), atol=1e-12)
    np.testing.assert_allclose(estimate(x, y, "product"), [np.mean([a * b for a, b in zip(x[:, d], y)]) for d in range(6)], atol=1e-12)
    np.testing.assert_allclose(estimate(x, y), [spearmanr(x[:, d], y).statistic for d in range(6)], atol=1e-12)
    np.testing.assert_allclose(estimate(x, y, "sign_sign"), [kendalltau(x[:, d], y).statistic for d in range(6)], atol=1e-12)  # no ties
    tied = np.round(x, 1)
    np.testing.assert_allclose(estimate(tied, y), [spearmanr(tied[:, d], y).statistic for d in range(6)], atol=1e-12)
    assert estimate(np.full((17, 1), 3.0), y).tolist() == [0.0]


def test_rank_estimators_do_not_feel_increasing_transforms(evidence):
    x, y = evidence
    for estimator in ALL:
        plain = estimate(x, y, estimator)
        of_y, of_x = np.allclose(estimate(x, np.exp(3 * y), estimator), plain), np.allclose(estimate(np.exp(x), y, estimator), plain)
        assert (of_y, of_x) == {"sign": (True, False), "product": (False, False)}.get(estimator, (True, True)), estimator


def caps(seed: int, n: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), rng.dirichlet(np.ones(n)) * 2.5


@pytest.mark.parametrize("seed", range(6))
def test_the_linear_projection_is_the_best_there_is_and_depends_on_ranks_alone(seed):
    coefficient, cap = caps(seed)
    weights = linear_projection(coefficient, cap)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    partial = (weights > 0) & (np.abs(weights - cap) > 1e-12)
    assert partial.sum() <= 1 and (weights <= cap + 1e-15).all()
    best = linprog(-coefficient, A_eq=np.ones((1, 9)), b_eq=[1], bounds=[(0, c) for c in cap])
    assert coefficient @ weights == pytest.approx(-best.fun, abs=1e-9)
    for increasing in (np.exp, lambda v: v ** 3, lambda v: 100 * v - 7):
        np.testing.assert_array_equal(linear_projection(increasing(coefficient), cap), weights)


@pytest.mark.parametrize("seed", range(6))
def test_the_l2_projection_is_the_nearest_point(seed):
    coefficient, cap = caps(seed)
    weights = l2_projection(coefficient, cap)
    assert weights.sum() == pytest.approx(1, abs=1e-9) and (weights >= 0).all() and (weights <= cap + 1e-12).all()
    # nearest to the coefficients among all that are allowed: no step towards another allowed point comes nearer
    rng = np.random.default_rng(seed)
    for _ in range(200):
        other = linear_projection(rng.normal(size=9), cap)
        assert (coefficient - weights) @ (other - weights) <= 1e-9


def test_caps_that_cannot_hold_one_are_refused():
    for project in (linear_projection, l2_projection):
        with pytest.raises(ValueError, match=r"the caps sum to 0\.9"):
            project(np.arange(3.0), np.full(3, 0.3))
        with pytest.raises(ValueError, match="above 0"):
            project(np.arange(3.0), np.array([2.0, 0.0, 1.0]))
        np.testing.assert_allclose(project(np.arange(3.0), np.full(3, 1 / 3)), 1 / 3)
    assert linear_projection(np.array([0.1, 0.5]), np.array([3.0, 1.5])).tolist() == [0, 1], "a source of a cap above 1 gets all"
    assert linear_projection(np.zeros(3), np.full(3, 0.6)) == pytest.approx([0.6, 0.4, 0]), "equal ones in order"


SOURCES = {"good": 12, "fair": 10, "bad": 18}


def pool() -> list[dict]:
    """Rows of three sources, each with words of its own; tokens are 10 a row."""
    words = {"good": "alpha beta gamma delta", "fair": "kappa lambda sigma omega", "bad": "lorem ipsum dolor amet"}
    rng = np.random.default_rng(3)
    return [chat(f"q {name} {i}", " ".join(rng.permutation(words[name].split())), source=name, group=f"{name}!")
            for name, n in SOURCES.items() for i in range(n)]


def planted(path, *, models: int = 9, spoilt: bool = False):
    """A table in which models that predict `good` well err little, those that predict `bad` well err much, and `fair` says little."""
    rng = np.random.default_rng(1)
    error = rng.permutation(np.linspace(0.2, 0.8, models))
    lines = [{"model": f"m{i}", "error": e, "good": 1 + e ** 2, "bad": 3 - e, "fair": 1 + 0.3 * e + rng.uniform(-0.4, 0.4)} for i, e in enumerate(error)]
    if spoilt:
        lines += [{"model": "none", "error": 0.99, "good": "", "bad": 1, "fair": 1}, {"model": "unmeasured", "error": "", "good": 1, "bad": 1, "fair": 1}]
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, ["model", "error", "good", "fair", "bad"])
        writer.writeheader()
        writer.writerows(lines)
    return lines


def correlated(tmp_path, rows=None, *, seed=2, **settings):
    rows = rows or pool()
    source = rows_artifact(tmp_path, rows, annotations={"tokens": [10] * len(rows)})
    stages = settings.pop("stages", {})
    given = {} if "models" in settings else {"table": "models.csv"}
    return run_step(tmp_path, source, {"perplexity_correlations": {"budget": {"rows": 15}} | given | settings}, seed=seed, **stages)


def by_source(out, rows) -> dict[str, int]:
    where = {r["row_id"]: r["source"] for r in complete(rows)}
    found: dict[str, int] = {}
    for i in kept_ids(out):
        found[where[i]] = found.get(where[i], 0) + 1
    return found


def test_the_budget_goes_to_the_sources_that_tell_good_models_from_bad(tmp_path):
    lines, rows = planted(tmp_path / "models.csv", spoilt=True)[:9], pool()
    out = correlated(tmp_path)
    assert by_source(out, rows) == {"good": 12, "fair": 3}
    report = out.json("perplexity_correlations.json")
    stated = {s["source"]: s for s in report["sources"]}
    assert stated["good"]["coefficient"] == pytest.approx(1) and stated["bad"]["coefficient"] == pytest.approx(-1)
    assert stated["fair"]["coefficient"] == pytest.approx(spearmanr([m["fair"] for m in lines], [m["error"] for m in lines]).statistic)
    assert [stated[s]["weight"] for s in ("good", "fair", "bad")] == pytest.approx([12 / 15, 3 / 15, 0])
    assert report["left_out"] == ["none", "unmeasured"] and len(report["models"]) == 9
    found = decisions(out)
    assert all(found[r["row_id"]]["score"] == stated[r["source"]]["coefficient"] for r in complete(rows))
    in_tokens = correlated(tmp_path, budget={"tokens": 145})
    assert by_source(in_tokens, rows) == {"good": 12, "fair": 2}
    assert set(kept_ids(correlated(tmp_path, seed=5))) != set(kept_ids(out)), "rows inside a source are drawn"
    spread = by_source(correlated(tmp_path, projection="l2"), rows)
    assert 14 <= sum(spread.values()) <= 15 and spread["good"] == 12


def test_a_source_that_no_model_knows_is_left_out_or_classified(tmp_path):
    planted(tmp_path / "models.csv")
    like_good = [chat(f"q other {i}", "delta alpha gamma beta", source="new") for i in range(4)]
    like_bad = [chat(f"q more {i}", "amet dolor ipsum lorem", source="newer") for i in range(4)]
    rows = [*pool(), *like_good, *like_bad]
    out = correlated(tmp_path, rows)
    assert by_source(out, rows) == {"good": 12, "fair": 3}
    reasons = [d["reason"] for d in decisions(out).values()]
    assert reasons.count("the models' losses on its source are not known") == 8
    ranked = correlated(tmp_path, rows, rank="classifier", budget={"rows": 12})
    score = {i: d["score"] for i, d in decisions(ranked).items()}
    of = {s: [score[r["row_id"]] for r in complete(rows) if r["source"] == s] for s in (*SOURCES, "new", "newer")}
    assert min(*of["good"], *of["new"]) > max(*of["bad"], *of["newer"], *of["fair"])
    assert set(kept_ids(ranked)) == set(sorted(score, key=lambda i: -score[i])[:12])
    assert ranked.json("perplexity_correlations.json")["classifier"]["trained_on"] > 30
    with pytest.raises(DataError, match="the sources that the models know hold 40"):
        correlated(tmp_path, rows, budget={"rows": 41})
    with pytest.raises(DataError, match="nothing to tell them from"):
        correlated(tmp_path, pool(), rank="classifier", budget={"rows": 40})


def test_losses_and_errors_come_from_stages(tmp_path):
    """Bits a byte of the answers, from annotated losses; errors from evaluations or by hand."""
    rows, models, stages = pool(), {}, {}
    said = [len(r["messages"][1]["content"].encode()) for r in rows]
    for i in range(5):
        good, bad = 1 + 0.1 * i, 2 - 0.1 * i
        per_byte = [{"good": good, "bad": bad, "fair": 1.0}[r["source"]] for r in rows]
        nll = [None if k == 0 else b * n * math.log(2) for k, (b, n) in enumerate(zip(per_byte, said))]
        stages[f"scored{i}"] = rows_artifact(tmp_path, rows, name=f"scored{i}", annotations={"nll": nll})
        models[f"m{i}"] = {"losses": f"scored{i}"} | ({"error": 0.5 + i} if i == 3 else {"evaluation": f"eval{i}"})
        stages[f"eval{i}"] = loss_of(tmp_path, f"eval{i}", 0.5 + i)
    del stages["eval3"]
    method = PerplexityCorrelations(models=models, budget={"rows": 15})
    from ftpipe.curate.step import StepContext

    ctx = StepContext(name="s", key="", out=tmp_path, work=tmp_path, inputs=stages, env=Environment(tmp_path, tmp_path, "t"), log=None, listener=None)
    for i, (name, error, losses) in enumerate(method._from_stages(ctx)):
        assert name == f"m{i}" and error == pytest.approx(0.5 + i)
        assert losses == pytest.approx({"good": 1 + 0.1 * i, "bad": 2 - 0.1 * i, "fair": 1.0})
    out = correlated(tmp_path, rows, models=models, stages=stages)
    assert by_source(out, rows) == {"good": 12, "fair": 3}
    accuracy = {f"eval{i}": evaluation(tmp_path, f"eval{i}", [("adapter", "quiz", "accuracy", 0.9 - i / 10, 1.0, True)]) for i in range(5)}
    measured = {n: {"losses": w["losses"], "evaluation": f"eval{n[1]}"} for n, w in models.items()}
    right = correlated(tmp_path, rows, models=measured, suites=["quiz"], by="group", stages=stages | accuracy)
    assert kept_ids(right) == kept_ids(out), "less accuracy is more error"
    with pytest.raises(DataError, match="has no losses"):
        correlated(tmp_path, rows, models=models, stages=stages | {"scored0": rows_artifact(tmp_path, rows, name="scored0")})


def test_what_cannot_be_used_is_said(tmp_path):
    env = Environment(tmp_path, tmp_path, "test")
    stage = CurateStepStage(rows="rows", step={"perplexity_correlations": {"table": "models.csv", "budget": {"rows": 3}}})
    with pytest.raises(ConfigError, match="is no CSV"):
        stage.externals(env)
    planted(tmp_path / "models.csv")
    before = stage.externals(env)
    planted(tmp_path / "models.csv", models=8)
    assert stage.externals(env) != before, "another table is another key"
    planted(tmp_path / "models.csv", models=2)
    with pytest.raises(DataError, match="2 of 2 models"):
        correlated(tmp_path)
    with pytest.raises(DataError, match="on none of the sources here"):
        correlated(tmp_path, [chat("a", "b", source="elsewhere")] * 20)
    (tmp_path / "models.csv").write_text("model,good\na,1\n")
    with pytest.raises(DataError, match="no columns model and error"):
        correlated(tmp_path)
    (tmp_path / "models.csv").write_text("model,error,good\na,1,2\na,2,3\nb,1,1\n")
    with pytest.raises(DataError, match="names a model twice"):
        correlated(tmp_path)
    for wrong in ({}, {"table": "t.csv", "models": {"a": {"losses": "s", "error": 1}}}, {"models": {"a": {"losses": "s", "error": 1}}},
                  {"models": {n: {"losses": "s"} for n in "abc"}}):
        with pytest.raises(ValueError, match=r"give"):
            parse("curate", {"perplexity_correlations": {"budget": {"rows": 1}} | wrong})

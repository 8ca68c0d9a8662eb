"""InstructMining: the regression, the published rules, the indicators, and the step."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from ftpipe.curate.select._indicators import mtld, neighbour_distances
from ftpipe.curate.select.instruct_mining import RULES, InstructMining, least_squares, predicted
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from ftpipe.models.scores import score_rows
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step
from tests.curate.evaluations import evaluation, loss_of
from tests.models.data import context, some_rows

TRUE = {"intercept": 0.7, "reward": -0.15, "length": 8e-4, "knn": -0.9}


def drawn(runs: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"reward": rng.normal(1, 2, runs), "length": rng.uniform(50, 400, runs), "knn": rng.uniform(0.2, 1.5, runs)}


def test_least_squares_returns_the_planted_rule():
    means = drawn(40)
    fit = least_squares(means, predicted(TRUE, means))
    assert fit.coefficients == pytest.approx(TRUE, abs=1e-6) and fit.r2 == pytest.approx(1) and not fit.dropped


def test_with_noise_the_rule_is_found_within_its_standard_errors_and_these_are_right():
    means = drawn(40)
    away = []
    for seed in range(200):
        fit = least_squares(means, predicted(TRUE, means) + np.random.default_rng(1000 + seed).normal(0, 0.05, 40))
        away.append([(fit.coefficients[n] - TRUE[n]) / fit.errors[n] for n in TRUE])
    away = np.array(away)  # t-distributed with 36 degrees of freedom: standard deviation 1.03
    assert 0.9 < away.std() < 1.15 and np.abs(away.mean(axis=0)).max() < 0.25 and (np.abs(away) < 2.03).mean() == pytest.approx(0.95, abs=0.03)
    assert 0.9 < fit.r2 < 1


def test_terms_that_say_nothing_are_left_out():
    means = drawn(40) | {"noise": np.random.default_rng(9).normal(size=40), "constant": np.full(40, 3.7)}
    fit = least_squares(means, predicted(TRUE, means) + np.random.default_rng(1).normal(0, 0.05, 40), significance=0.05)
    assert set(fit.coefficients) == set(TRUE) and set(fit.dropped) == {"noise", "constant"}
    assert fit.dropped["constant"] == "the same in every run" and fit.dropped["noise"].startswith("not significant (p = 0.")
    assert max(fit.p_values[n] for n in TRUE if n != "intercept") <= 0.05
    with pytest.raises(DataError, match="4 runs cannot tell 4 coefficients apart"):
        least_squares({n: v[:4] for n, v in drawn(40).items()}, np.ones(4))
    twice = drawn(40)
    with pytest.raises(DataError, match="determine each other"):
        least_squares(twice | {"double": 2 * twice["knn"] + 1}, np.arange(40.0))


@pytest.mark.parametrize("rule", RULES)
def test_in_both_published_rules_a_higher_reward_lowers_the_loss(rule):
    base = {n: np.array([1.0, 1.0]) for n in RULES[rule]}
    low, high = predicted(RULES[rule], base | {"reward": np.array([0.0, 2.0])})
    assert high < low
    worse, better = predicted(RULES["later"], {n: np.array([0.0, 1.0]) if n == "understandability" else np.ones(2) for n in RULES["later"]})
    assert better - worse == pytest.approx(0.4421)  # as printed: more understandable, higher predicted loss


def pool(workspace, n: int = 24):
    """Rows with annotations; the third is known of all but one."""
    rng = np.random.default_rng(4)
    rows = some_rows(n)
    notes = {"reward": rng.normal(size=n), "understandability": rng.uniform(size=n), "naturalness": rng.uniform(size=n), "coherence": rng.uniform(size=n),
             "same": np.full(n, 5.0)}
    listed = {k: v.tolist() for k, v in notes.items()}
    return complete(rows), notes, rows_artifact(workspace, rows, annotations=listed)


def test_the_lowest_predicted_losses_are_kept_and_a_constant_changes_nothing(tmp_path, tiny_model):
    rows, notes, source = pool(tmp_path)
    out = run_step(tmp_path, source, {"instruct_mining": {"rule": "later", "budget": {"rows": 7}}}, model=str(tiny_model))
    truth = 0.0274 - 0.0078 * notes["reward"] + 0.4421 * notes["understandability"] - 0.3212 * notes["naturalness"] - 0.1520 * notes["coherence"]
    found = decisions(out)
    assert [found[r["row_id"]]["score"] for r in rows] == pytest.approx(truth.tolist(), abs=1e-12)
    assert set(kept_ids(out)) == {rows[i]["row_id"] for i in np.argsort(truth)[:7]}
    assert out.json("instruct_mining.json")["rule"] == "later"
    more = {**RULES["later"], "same": 100.0}
    again = run_step(tmp_path, source, {"instruct_mining": {"coefficients": more, "budget": {"rows": 7}}}, model=str(tiny_model))
    assert kept_ids(again) == kept_ids(out)


def test_the_indicators_are_those_that_the_model_and_the_text_say(tmp_path, tiny_model):
    rows, _, source = pool(tmp_path)
    rule = {"input_length": 1.0, "output_length": 1.0, "perplexity": 0.001, "mtld": 1.0, "knn_3": 1.0}
    out = run_step(tmp_path, source, {"instruct_mining": {"coefficients": rule, "budget": {"rows": 5}}}, model=str(tiny_model))
    notes = {r["row_id"]: r for r in pq.read_table(out.file("annotations.parquet")).to_pylist()}
    scores = score_rows(RowSet(source), context(tmp_path / "c"), model=str(tiny_model)).to_pylist()
    points = np.array([s["embedding"] for s in scores])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    answers = {r["row_id"]: r["messages"][1]["content"] for r in rows}
    for i, s in enumerate(scores):
        line = notes[s["row_id"]]
        assert line["output_length"] == s["trained_tokens"] == len(answers[s["row_id"]]) + 1  # bytes and an end token
        assert line["input_length"] == s["tokens"] - s["trained_tokens"]
        assert line["perplexity"] == pytest.approx(np.exp(s["loss"])) and line["mtld"] == mtld(answers[s["row_id"]])
        assert line["knn_3"] == pytest.approx(np.sort(np.linalg.norm(points - points[i], axis=1))[3], abs=1e-6)
        assert line["predicted_log_loss"] == pytest.approx(sum(c * line[n] for n, c in rule.items()))


def test_lexical_diversity_by_hand():
    assert mtld("") == 0 and mtld("one two three") == 3  # no stretch ends: the text is one
    # "a a": the ratio falls to 1/2 at the second word, so each two words are a stretch, in both directions
    assert mtld("a a a a a a") == 2
    words = "a b c d a"  # 4/5 at the end: (1 - 0.8) / 0.28 of a stretch
    assert mtld(words) == pytest.approx(5 / (0.2 / 0.28))
    assert mtld("A. a, A; a") == 2
    # forwards a stretch ends after "a a" and "b c d e" is none; backwards "e d c b a" ends none, and the last "a" leaves 5/6
    assert mtld("a a b c d e") == pytest.approx((6 / 1 + 6 / ((1 - 5 / 6) / 0.28)) / 2)
    assert np.isnan(neighbour_distances(np.zeros((3, 2)), 3)).all()


def test_a_row_of_unknown_indicators_is_dropped_with_that_reason(tmp_path, tiny_model):
    rows = [*some_rows(6), {"format": "messages", "messages": [{"role": "user", "content": "hello?"}]}]
    step = {"instruct_mining": {"coefficients": {"output_length": 1.0}, "budget": {"rows": 3}}}
    found = decisions(run_step(tmp_path, rows_artifact(tmp_path, rows), step, model=str(tiny_model)))
    assert [d["reason"] for d in found.values()].count("an indicator of the row is not known") == 1
    with pytest.raises(DataError, match="'reward' is none that can be computed here"):
        run_step(tmp_path, rows_artifact(tmp_path, rows), {"instruct_mining": {"rule": "first", "budget": {"rows": 3}}}, model=str(tiny_model))


def test_the_rule_is_fitted_to_runs_of_the_pipeline(tmp_path, tiny_model):
    """Losses of runs follow a rule of their rows' mean quality and answer length; the step finds the rule and applies it row by row."""
    rng = np.random.default_rng(2)
    rows = [chat(f"What does {i} do?", "x" * int(rng.integers(3, 40))) for i in range(40)]
    quality = rng.normal(size=40)
    source = rows_artifact(tmp_path, rows, annotations={"quality": quality.tolist()})
    length = np.array([len(r["messages"][1]["content"]) + 1 for r in rows])
    runs, stages = [], {}
    for k in range(10):
        chosen = sorted(rng.choice(40, size=8, replace=False).tolist())
        times = [1 + (i % 2) for i in range(8)]
        log_loss = 0.4 - 0.2 * np.average(quality[chosen], weights=times) + 0.01 * np.average(length[chosen], weights=times)
        stages[f"subset{k}"] = rows_artifact(tmp_path, [rows[i] | {"times": t} for i, t in zip(chosen, times)], name=f"subset{k}")
        stages[f"eval{k}"] = loss_of(tmp_path, f"eval{k}", float(np.exp(log_loss)))
        runs.append({"rows": f"subset{k}", "evaluation": f"eval{k}"})
    settings = {"runs": runs, "indicators": ["quality", "output_length"], "budget": {"rows": 6}}
    out = run_step(tmp_path, source, {"instruct_mining": settings}, model=str(tiny_model), **stages)
    report = out.json("instruct_mining.json")
    assert report["coefficients"] == pytest.approx({"intercept": 0.4, "quality": -0.2, "output_length": 0.01}, abs=1e-6)
    assert report["rule"] == "fitted" and report["runs"] == 10 and report["r2"] == pytest.approx(1)
    truth = 0.4 - 0.2 * quality + 0.01 * length
    assert set(kept_ids(out)) == {complete(rows)[i]["row_id"] for i in np.argsort(truth)[:6]}

    def attempt(message: str, changes: dict | None = None, **more):
        with pytest.raises(DataError, match=message):
            run_step(tmp_path, source, {"instruct_mining": settings | (changes or {})}, model=str(tiny_model), **(stages | more))

    attempt("2 runs cannot tell 3 coefficients", {"runs": runs[:2]})
    attempt("1 rows of subset0 are not among those", subset0=rows_artifact(tmp_path, [chat("new", "row")], name="subset0"))
    attempt("has no suite 'other'", {"suite": "other"})
    attempt("which is no loss", eval0=evaluation(tmp_path, "eval0", [("adapter", "heldout_loss", "accuracy", 0.5, 1.0, True)]))
    attempt("none of the indicators tells the runs apart", {"indicators": ["mtld"]})  # each answer is one word


def test_one_rule_is_given():
    for wrong in ({}, {"rule": "first", "coefficients": {"mtld": 1.0}}, {"coefficients": {"intercept": 1.0}}):
        with pytest.raises(ValueError, match=r"give one of|no indicator"):
            InstructMining(budget={"rows": 1}, **wrong)

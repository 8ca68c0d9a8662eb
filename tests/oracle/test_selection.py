"""Perplexity, LoBaSS and sensitivity sampling against planted truth and exact identities."""

from __future__ import annotations

import shutil
import string
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ftpipe import slots
from ftpipe.curate.select import sensitivity_sampling as module
from ftpipe.curate.select._clusters import cluster, fewest_clusters
from ftpipe.curate.select.lobass import learnability
from ftpipe.curate.select.sensitivity_sampling import draw, draws_for, epsilon_of, probabilities, variance
from ftpipe.data.render import Renderer
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError, DataError
from ftpipe.models.loading import load_adapted, load_merged, load_model, load_tokenizer
from ftpipe.models.scores import score_rows
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Environment
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step
from tests.models.data import context, some_rows, trained_adapter

SILENT = {"format": "messages", "messages": [{"role": "user", "content": "hello?"}]}

BF16 = 1e-3
"""Nats a token: rounding between ftpipe's forward pass and transformers', both in bf16. A wrong shift or mask of the labels is off by a hundred times that."""


def naive_losses(model, tokenizer, rows: list[dict]) -> dict[str, float]:
    """Mean loss of the answers by row_id, from full logits."""
    renderer, found = Renderer(tokenizer), {}
    for row in complete(rows):
        r = renderer.row(row)
        tokens = torch.tensor([r.input_ids])
        with torch.inference_mode():
            logp = torch.log_softmax(model(input_ids=tokens).logits[0].float(), -1)
        each = [-logp[t - 1, r.input_ids[t]].item() for t in range(1, len(r.input_ids)) if r.trained[t]]
        found[row["row_id"]] = float(np.mean(each))
    return found


@pytest.fixture
def base(tiny_model, tmp_path):
    env = Environment(tmp_path, tmp_path, "test")
    return load_model(str(tiny_model), env, device="cpu"), load_tokenizer(str(tiny_model), env)


# --- loss and perplexity


def test_the_loss_step_annotates_what_the_model_says(tmp_path, tiny_model, base):
    rows = some_rows(8)
    out = run_step(tmp_path, rows_artifact(tmp_path, [*rows, SILENT]), {"loss": {"embedding": True}}, model=str(tiny_model))
    lines = {r["row_id"]: r for r in pq.read_table(out.file("annotations.parquet")).to_pylist()}
    truth = naive_losses(*base, rows)
    for row_id, loss in truth.items():
        assert lines[row_id]["loss"] == pytest.approx(loss, abs=BF16)
        assert lines[row_id]["loss"] == lines[row_id]["nll"] / lines[row_id]["trained_tokens"] and len(lines[row_id]["embedding"]) == 32
    silent, = (line for i, line in lines.items() if i not in truth)
    assert silent["loss"] is None and silent["trained_tokens"] == 0
    assert RowSet(out).annotation("loss").num_rows == 9 and len(kept_ids(out)) == 9


@pytest.mark.parametrize("keep", [0.2, 0.29, 0.5, 1.0])
def test_perplexity_keeps_exactly_the_lowest_share(tmp_path, tiny_model, base, keep):
    rows = some_rows(11)
    out = run_step(tmp_path, rows_artifact(tmp_path, rows), {"perplexity": {"keep": keep}}, model=str(tiny_model))
    truth = {i: np.exp(loss) for i, loss in naive_losses(*base, rows).items()}
    n = int(keep * 11)
    assert sorted(kept_ids(out)) == sorted(sorted(truth, key=truth.get)[:n])
    for row_id, line in decisions(out).items():
        assert line["score"] == pytest.approx(truth[row_id], rel=BF16)
        assert line["kept"] or line["reason"] == "perplexity too high"


def test_perplexity_bounds(tmp_path, tiny_model, base):
    rows = some_rows(11)
    truth = {i: float(np.exp(loss)) for i, loss in naive_losses(*base, rows).items()}
    low, high = np.quantile(list(truth.values()), [0.25, 0.75])
    out = run_step(tmp_path, rows_artifact(tmp_path, [*rows, SILENT]), {"perplexity": {"min": low, "max": high}}, model=str(tiny_model))
    assert sorted(kept_ids(out)) == sorted(i for i, p in truth.items() if low <= p <= high)
    assert {line["reason"] for line in decisions(out).values()} == {None, "perplexity too low", "perplexity too high", "no perplexity: nothing is trained on"}


def test_the_perplexity_is_conditional_on_the_question(tmp_path, tiny_model):
    rows = [chat("one question", "same answer"), chat("quite another one?", "same answer")]
    out = run_step(tmp_path, rows_artifact(tmp_path, rows), {"perplexity": {"keep": 1.0}}, model=str(tiny_model))
    a, b = (line["score"] for line in decisions(out).values())
    assert a != b


@pytest.mark.parametrize("settings", [{"keep": 0.5, "min": 2}, {"min": 5, "max": 2}, {"keep": None}, {"keep": 0}])
def test_contradictory_perplexity_settings_are_refused(settings):
    from ftpipe.curate.filter.perplexity import Perplexity

    with pytest.raises(ValueError):
        Perplexity(**settings)


def test_perplexity_settings_come_back():
    from ftpipe.curate.filter.perplexity import Perplexity

    for settings in ({}, {"keep": 0.5}, {"max": 50.0}):
        method = Perplexity(**settings)
        assert Perplexity(**method.dump()["perplexity"]) == method


# --- LoBaSS


def test_learnability_is_one_minus_the_ratio_and_the_count_cancels():
    rng = np.random.default_rng(0)
    base, reference, count = rng.uniform(0.1, 5, 200), rng.uniform(0.1, 5, 200), rng.integers(1, 90, 200)
    score = learnability(base, reference)
    np.testing.assert_allclose(score, 1 - reference / base, atol=1e-12)
    np.testing.assert_allclose(score, learnability(base * count, reference * count), atol=1e-12)
    other = (base - reference) / reference
    np.testing.assert_array_equal(np.argsort(-score, kind="stable"), np.argsort(-other, kind="stable"))
    assert (score[reference >= base] <= 0).all() and (score[reference < base] > 0).all()
    assert np.isnan(learnability(np.array([0.0]), np.array([1.0]))).all()


def planted(n: int = 14) -> tuple[list[dict], list[str], list[str]]:
    """Rows whose answer follows a rule, and rows whose answer is noise, of like length; with their ids."""
    rng = np.random.default_rng(3)
    good = [chat(f"say it {i}", "the answer is always the same") for i in range(n)]
    noise = [chat(f"say so {i}", "".join(rng.choice(list(string.ascii_letters + string.digits), size=29))) for i in range(n)]
    rows = [r for pair in zip(good, noise) for r in pair]
    ids = [r["row_id"] for r in complete(rows)]
    return rows, ids[::2], ids[1::2]


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory):
    """A reference trained for a short while on the whole planted pool."""
    workspace = tmp_path_factory.mktemp("lobass")
    rows, good, noise = planted()
    return workspace, rows, good, noise, trained_adapter(workspace, tiny_model, rows, steps=40)


def test_lobass_scores_are_those_of_two_full_forwards(learned, tiny_model):
    workspace, rows, _, _, reference = learned
    env = Environment(workspace, workspace, "test")
    tokenizer = load_tokenizer(str(tiny_model), env)
    before = naive_losses(load_model(str(tiny_model), env, device="cpu"), tokenizer, rows)
    after = naive_losses(load_adapted(str(tiny_model), env, reference.file("adapter"), device="cpu"), tokenizer, rows)
    out = run_step(workspace, rows_artifact(workspace, rows), {"lobass": {"reference": "reference", "budget": {"rows": 5}}}, model=str(tiny_model),
                   reference=reference)
    notes = {r["row_id"]: r for r in pq.read_table(out.file("annotations.parquet")).to_pylist()}
    for row_id, line in decisions(out).items():
        assert line["score"] == pytest.approx(1 - notes[row_id]["loss_reference"] / notes[row_id]["loss_base"], abs=1e-6)
        assert line["score"] == pytest.approx(1 - after[row_id] / before[row_id], abs=BF16)


def test_rows_with_random_answers_rank_below_those_that_can_be_learned(learned, tiny_model):
    workspace, rows, good, noise, reference = learned
    step = {"lobass": {"reference": "reference", "budget": {"rows": len(good)}}}
    out = run_step(workspace, rows_artifact(workspace, rows), step, model=str(tiny_model), reference=reference)
    score = {i: line["score"] for i, line in decisions(out).items()}
    assert min(score[i] for i in good) > max(score[i] for i in noise) + 0.02  # the gap is 0.04
    assert sorted(kept_ids(out)) == sorted(good)
    summary = out.json("lobass.json")
    assert summary["chosen"] == len(good) and summary["loss_reference"] < summary["loss_base"]


def test_rows_that_did_not_improve_rank_below_all_that_did(learned, tiny_model):
    """The reference unlearned some rows: it was trained on others only, at a high rate."""
    workspace, rows, *_ = learned
    reference = trained_adapter(workspace, tiny_model, [r for r in rows if r["messages"][0]["content"].startswith("say it")], steps=60, rate=3e-2)
    step = {"lobass": {"reference": "reference", "budget": {"rows": 3}}}
    out = run_step(workspace, rows_artifact(workspace, rows), step, model=str(tiny_model), reference=reference)
    lines = pq.read_table(out.file("annotations.parquet")).to_pylist()
    worse = [r["learnability"] for r in lines if r["loss_reference"] >= r["loss_base"]]
    better = [r["learnability"] for r in lines if r["loss_reference"] < r["loss_base"]]
    assert len(worse) >= 5 and len(better) >= 5, "the data has both kinds"
    assert max(worse) <= 0 < min(better)


def test_the_floor_leaves_out_what_is_known(learned, tiny_model):
    workspace, rows, _, _, reference = learned
    table = score_rows(RowSet(rows_artifact(workspace, rows)), context(workspace / "c"), model=str(tiny_model), want=("loss",))
    floor = float(np.median(table["loss"].to_numpy()))
    out = run_step(workspace, rows_artifact(workspace, [*rows, SILENT]), {"lobass": {"reference": "reference", "budget": {"share": 1.0, "unit": "rows"},
                                                                                     "floor": floor}}, model=str(tiny_model), reference=reference)
    low = {r["row_id"] for r in table.to_pylist() if r["loss"] < floor}
    assert sorted(kept_ids(out)) == sorted(set(table["row_id"].to_pylist()) - low)
    found = decisions(out)
    assert {found[i]["reason"] for i in low} == {"base loss below the floor"}
    assert [line["reason"] for line in found.values()].count("no loss: nothing is trained on") == 1


def test_a_token_budget_is_kept_from_the_top(learned, tiny_model):
    workspace, rows, _, _, reference = learned
    tokens = list(range(10, 10 + len(rows)))
    artifact = rows_artifact(workspace, rows, annotations={"tokens": tokens})
    out = run_step(workspace, artifact, {"lobass": {"reference": "reference", "budget": {"tokens": 150}}}, model=str(tiny_model), reference=reference)
    cost = dict(zip([r["row_id"] for r in complete(rows)], tokens))
    ranked = sorted(decisions(out).items(), key=lambda e: -e[1]["score"])
    left, expected = 150, []
    for row_id, _ in ranked:
        if cost[row_id] <= left:
            expected.append(row_id)
            left -= cost[row_id]
    assert sorted(kept_ids(out)) == sorted(expected)


def test_a_reference_that_is_no_adapter_is_refused(learned, tiny_model):
    workspace, rows, *_ = learned
    artifact = rows_artifact(workspace, rows)
    with pytest.raises(ConfigError, match="makes no adapter"):
        run_step(workspace, artifact, {"lobass": {"reference": "other", "budget": {"rows": 3}}}, model=str(tiny_model), other=artifact)


def test_a_reference_that_learned_nothing_scores_zero_everywhere(learned, tiny_model):
    workspace, rows, *_ = learned
    start = trained_adapter(workspace, tiny_model, rows[:2], steps=0)
    out = run_step(workspace, rows_artifact(workspace, rows), {"lobass": {"reference": "reference", "budget": {"rows": 3}}}, model=str(tiny_model),
                   reference=start)
    assert {round(line["score"], 3) for line in decisions(out).values()} == {0.0} and len(kept_ids(out)) == 3


@pytest.fixture(scope="module")
def tuned(tiny_model, tmp_path_factory):
    """Rows of many lengths, a reference trained on them for a short while, and the same as a model of its own."""
    workspace, rng = tmp_path_factory.mktemp("tuned"), np.random.default_rng(6)
    rows = [chat(f"say so {i}", "".join(rng.choice(list(string.ascii_letters), size=20 + 4 * i))) for i in range(24)]
    reference, folder = trained_adapter(workspace, tiny_model, rows, steps=20), workspace / "model"
    shutil.copytree(tiny_model, folder)
    env = Environment(workspace, workspace, "test")
    load_merged(str(tiny_model), env, reference.file("adapter"), dtype="float32", device="cpu").save_pretrained(folder)
    return workspace, rows, reference, folder


def test_a_separate_model_can_be_the_reference(tuned, tiny_model):
    """The adapter folded into the weights is another model, and scores as the adapter does."""
    workspace, rows, reference, folder = tuned
    env, source = Environment(workspace, workspace, "test"), rows_artifact(workspace, rows)
    by_adapter = run_step(workspace, source, {"lobass": {"reference": "reference", "budget": {"rows": 5}}}, model=str(tiny_model), reference=reference)
    step = {"lobass": {"reference_model": str(folder), "budget": {"rows": 5}}}
    by_model = run_step(workspace, source, step, model=str(tiny_model))
    one, other = decisions(by_adapter), decisions(by_model)
    for row_id, line in one.items():
        assert other[row_id]["score"] == pytest.approx(line["score"], abs=BF16)
    assert by_model.json("lobass.json")["same_tokens"]
    stage = slots.slots()["stages"].get("curate_step")(rows="rows", step=step, model=str(tiny_model))
    assert stage.externals(env)["reference_model"]["weights"] != stage.externals(env)["model"]["weights"], "another reference is another key"


def test_the_ratio_follows_the_length_less_than_the_difference(tuned, tiny_model):
    workspace, rows, reference, _ = tuned
    step = {"lobass": {"reference": "reference", "score": "difference", "budget": {"rows": 5}}}
    out = run_step(workspace, rows_artifact(workspace, rows), step, model=str(tiny_model), reference=reference)
    notes = {r["row_id"]: r for r in pq.read_table(out.file("annotations.parquet")).to_pylist()}
    length = {r["row_id"]: len(r["messages"][1]["content"]) + 1 for r in complete(rows)}
    for row_id, line in decisions(out).items():
        lost = notes[row_id]["loss_base"] - notes[row_id]["loss_reference"]
        assert line["score"] == notes[row_id]["loss_difference"] == pytest.approx(lost * length[row_id], rel=1e-6, abs=1e-9)
    longest = sorted(length, key=length.get)[-10:]
    assert len(set(kept_ids(out)) & set(longest)) == 5
    follows = out.json("lobass.json")["spearman_length"]
    assert follows["score"] == follows["difference"] > 0.7
    ratio = run_step(workspace, rows_artifact(workspace, rows), {"lobass": {"reference": "reference", "budget": {"rows": 5}}}, model=str(tiny_model),
                     reference=reference)
    score = ratio.json("lobass.json")["spearman_length"]["score"]
    assert abs(score) < follows["difference"] - 0.3


def test_one_reference_is_given():
    for wrong in ({}, {"reference": "a", "reference_model": "b"}):
        with pytest.raises(ValueError, match="give either reference"):
            slots.parse("curate", {"lobass": {"budget": {"rows": 1}} | wrong})


def test_a_reference_that_saw_rows_several_times_is_warned_of(learned, tiny_model, caplog):
    import pyarrow as pa

    workspace, rows, _, _, reference = learned
    ids = [r["row_id"] for r in complete(rows)]
    store, key = Store(workspace), uuid.uuid4().hex * 2
    with store.building("train", key) as out:
        shutil.copytree(reference.file("adapter"), out / "adapter")
        pq.write_table(pa.table({"row_id": [*ids[:7], "gone"], "times": [3] * 8}), out / "seen.parquet")
        kept = store.commit(out, kind="train", name="seen", key=key, material={}, inputs={}, counts={}, meta={}, notes={})
    step = {"lobass": {"reference": "seen", "budget": {"rows": 5}}}
    with caplog.at_level("WARNING"):
        made = run_step(workspace, rows_artifact(workspace, rows), step, model=str(tiny_model), seen=kept)
    assert "seen saw rows up to 3 times" in caplog.text
    assert made.json("lobass.json")["reference_saw"] == {"share_of_rows": 7 / len(rows), "most_times": 3}


def test_the_loss_step_scores_a_model_with_an_adapter_too(learned, tiny_model):
    workspace, rows, _, _, reference = learned
    env = Environment(workspace, workspace, "test")
    truth = naive_losses(load_adapted(str(tiny_model), env, reference.file("adapter"), device="cpu"), load_tokenizer(str(tiny_model), env), rows)
    out = run_step(workspace, rows_artifact(workspace, rows), {"loss": {"adapter": "reference"}}, model=str(tiny_model), reference=reference)
    assert {i: line["score"] for i, line in decisions(out).items()} == pytest.approx(truth, abs=BF16)
    with pytest.raises(ConfigError, match="makes no adapter"):
        run_step(workspace, rows_artifact(workspace, rows), {"loss": {"adapter": "other"}}, model=str(tiny_model), other=rows_artifact(workspace, rows))


# --- sensitivity sampling: the mathematics


@pytest.fixture
def clusters():
    """400 points in 8 clusters of different sizes; the loss is constant inside a cluster."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(8), [100, 80, 70, 60, 40, 25, 15, 10])
    centre_loss = rng.uniform(0.2, 6, 8)
    return label, centre_loss, rng.uniform(0, 2, len(label)), centre_loss[label]


@pytest.mark.parametrize("hoelder", [0.0, 0.7, np.linspace(0, 2, 8)])
@pytest.mark.parametrize("floor", [0.0, 0.01, 0.5])
def test_probabilities_sum_to_one_and_the_estimate_is_unbiased(clusters, hoelder, floor):
    label, centre_loss, distance, _ = clusters
    loss = np.random.default_rng(1).uniform(0, 5, len(label))
    p = probabilities(centre_loss, label, distance, hoelder=hoelder, floor=floor)
    assert abs(p.sum() - 1) < 1e-12 and (p > 0).all()
    draws = 37
    weight = 1 / (draws * p)
    assert draws * (p * weight * loss).sum() == pytest.approx(loss.sum(), rel=1e-12)
    if floor == 0:
        sigma = centre_loss[label] + np.broadcast_to(hoelder, 8)[label] * distance ** 2
        np.testing.assert_allclose(p, sigma / (centre_loss[label].sum() + (np.broadcast_to(hoelder, 8)[label] * distance ** 2).sum()), rtol=1e-12)


def test_the_closed_variance_is_below_uniform_and_zero_where_the_proxy_is_exact(clusters):
    label, centre_loss, distance, loss = clusters
    n, total = len(loss), loss.sum()
    uniform = variance(loss, np.full(n, 1 / n), 50)
    assert uniform == pytest.approx((n * (loss ** 2).sum() - total ** 2) / 50, rel=1e-9)
    exact = probabilities(centre_loss, label, distance)
    assert variance(loss, exact, 50) == pytest.approx(0, abs=1e-18 * total ** 2)
    blurred = probabilities(centre_loss, label, distance, hoelder=0.3)
    assert 0 < variance(loss, blurred, 50) < uniform
    assert variance(loss, blurred, 50) == pytest.approx(((loss ** 2 / blurred).sum() - total ** 2) / 50, rel=1e-9)


def test_the_closed_variance_is_that_of_the_draws(clusters):
    label, centre_loss, distance, _ = clusters
    loss = np.random.default_rng(1).uniform(0, 5, len(label))
    p = probabilities(centre_loss, label, distance, hoelder=0.3, floor=0.01)
    rng, s = np.random.default_rng(5), 20
    estimates = np.array([(loss[i] / (s * p[i])).sum() for i in (draw(p, np.ones(len(p), dtype=int), s, rng) for _ in range(4000))])
    assert estimates.mean() == pytest.approx(loss.sum(), abs=5 * np.sqrt(variance(loss, p, s) / 4000))
    assert estimates.var() == pytest.approx(variance(loss, p, s), rel=0.15)


def test_equal_centre_losses_without_distances_give_uniform_probabilities(clusters):
    label, _, distance, _ = clusters
    p = probabilities(np.full(8, 2.5), label, distance, hoelder=0.0)
    np.testing.assert_allclose(p, 1 / len(label), rtol=1e-12)
    np.testing.assert_allclose(probabilities(np.zeros(8), label, distance * 0, hoelder=1.0), 1 / len(label))


def test_the_floor_lifts_points_of_zero_probability(clusters):
    label, centre_loss, distance, _ = clusters
    centre_loss = centre_loss.copy()
    centre_loss[3] = 0
    assert (probabilities(centre_loss, label, distance)[label == 3] == 0).all()
    p = probabilities(centre_loss, label, distance, floor=0.05)
    assert p.min() >= 0.05 / len(p) / 1.05 and abs(p.sum() - 1) < 1e-12


def test_a_budget_of_rows_is_drawn_exactly_and_one_of_tokens_never_exceeded():
    rng, p = np.random.default_rng(0), np.array([0.7, 0.2, 0.1])
    assert len(draw(p, np.ones(3, dtype=int), 5000, rng)) == 5000
    cost = np.array([3, 50, 7])
    for amount in (1, 10, 100, 1000):
        drawn = draw(p, cost, amount, np.random.default_rng(amount))
        assert cost[drawn].sum() <= amount
    same = [draw(p, cost, 1000, np.random.default_rng(9)) for _ in range(2)]
    np.testing.assert_array_equal(*same)


def test_clusters_are_found_and_centres_are_points_of_theirs():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(5), 30)
    points = rng.normal(0, 20, (5, 6))[truth] + rng.normal(0, 0.3, (150, 6))
    found = cluster(points, 5, seed=1)
    assert len({*zip(truth.tolist(), found.label.tolist())}) == 5
    for i, c in enumerate(found.centre):
        members = np.flatnonzero(found.label == i)
        assert c in members
        to_mean = np.linalg.norm(points[members] - points[members].mean(0), axis=1)
        assert np.linalg.norm(points[c] - points[members].mean(0)) == pytest.approx(to_mean.min())
    np.testing.assert_allclose(found.distance, np.linalg.norm(points - points[found.centre[found.label]], axis=1))
    assert (found.distance[found.centre] == 0).all()
    few = cluster(np.repeat(points[:3], 10, axis=0), 5, seed=1)
    assert len(few.centre) == 3 and (few.distance == 0).all()


def test_the_fewest_clusters_within_the_tolerance_are_found():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(11), 20)
    points = rng.normal(0, 20, (11, 5))[truth] + rng.normal(0, 0.1, (220, 5))
    whole = (cluster(points, 1, 3).distance ** 2).sum()
    found = fewest_clusters(points, 1e-3, 2.0, seed=3)
    assert len(found.centre) >= 11, "with fewer, two of the planted clusters share a centre"
    for tolerance, z in ((0.3, 2.0), (0.05, 1.0), (1e-9, 2.0)):
        one = (cluster(points, 1, 3).distance ** z).sum()
        found = fewest_clusters(points, tolerance, z, seed=3)
        k = len(found.centre)
        assert (found.distance ** z).sum() <= tolerance * one
        assert (cluster(points, k - 1, 3).distance ** z).sum() > tolerance * one
    assert whole > 0 and len(fewest_clusters(np.ones((4, 2)), 0.5, 2.0, seed=1).centre) == 1


def test_the_draws_of_an_error_and_back():
    for epsilon in (0.05, 0.1, 0.3, 1.0):
        s = draws_for(epsilon)
        assert (2 + 2 * epsilon / 3) / epsilon ** 2 <= s < (2 + 2 * epsilon / 3) / epsilon ** 2 + 1
        assert epsilon_of(s) <= epsilon < epsilon_of(s - 1)
    assert epsilon_of(200) ** 2 * 200 == pytest.approx(2 + 2 * epsilon_of(200) / 3)


# --- sensitivity sampling: the step


def sample(tmp_path: Path, model: Path, rows: list[dict], seed: int = 0, **settings):
    artifact = rows_artifact(tmp_path, rows, annotations={"tokens": [40] * len(rows)})
    step = {"sensitivity_sampling": {"clusters": 5, "budget": {"rows": 12}} | settings}
    return run_step(tmp_path, artifact, step, model=str(model), seed=seed)


def test_the_loss_is_asked_for_at_the_centres_only(tmp_path, tiny_model, monkeypatch):
    from ftpipe.models.service import ModelService

    scored, inner = [], ModelService.score

    def counting(self, rendered, *, loss=True, embed=False, **rest):
        scored.append((len(rendered), loss, embed))
        return inner(self, rendered, loss=loss, embed=embed, **rest)

    monkeypatch.setattr(ModelService, "score", counting)
    out = sample(tmp_path, tiny_model, some_rows(40))
    assert scored == [(40, False, True), (5, True, False)]
    assert out.json("sensitivity.json")["oracle_calls"] == 5
    scored.clear()
    probed = sample(tmp_path, tiny_model, some_rows(40), probes=2).json("sensitivity.json")
    away = sum(min(2, c["size"] - 1) for c in probed["by_cluster"])
    assert probed["oracle_calls"] == 5 + away and sum(n for n, loss, _ in scored if loss) == away
    assert isinstance(probed["lambda"], list) and all(v >= 0 for v in probed["lambda"])


def test_known_losses_come_from_the_cache(tmp_path, tiny_model):
    rows = some_rows(30)
    artifact = rows_artifact(tmp_path, rows, annotations={"tokens": [40] * 30})
    loss = run_step(tmp_path, artifact, {"loss": {"embedding": True}}, model=str(tiny_model))
    out = run_step(tmp_path, loss, {"sensitivity_sampling": {"clusters": 5, "budget": {"rows": 12}}}, model=str(tiny_model))
    assert out.manifest["notes"]["scored"] == 0 and out.json("sensitivity.json")["oracle_calls"] == 5
    known = {r["row_id"]: r["loss"] for r in RowSet(loss).annotation("loss").to_pylist()}
    for c in out.json("sensitivity.json")["by_cluster"]:
        assert c["centre_loss"] == known[c["centre"]]


def test_the_artifact_tells_how_it_was_drawn(tmp_path, tiny_model):
    rows = some_rows(40)
    out = sample(tmp_path, tiny_model, rows, hoelder=0.5, normalize=False, floor=0.02)
    table, report = pq.read_table(out.file("clusters.parquet")), out.json("sensitivity.json")
    p, times, label = (table[c].to_numpy() for c in ("probability", "times", "cluster"))
    assert abs(p.sum() - 1) < 1e-12 and times.sum() == 12 == report["drawn"]
    with RowSet(out).view() as con:
        kept = dict(con.execute("select row_id, times from rows where split = 'train'").fetchall())
    assert kept == {i: t for i, t in zip(table["row_id"].to_pylist(), times.tolist()) if t}
    weight = RowSet(out).annotation("sampling_weight")
    np.testing.assert_allclose(weight["sampling_weight"].to_numpy(), 1 / (12 * p), rtol=1e-12)
    # the probabilities again, from the embeddings and the centres' losses
    scores = score_rows(RowSet(rows_artifact(tmp_path, rows)), context(tmp_path / "again"), model=str(tiny_model))
    points = np.stack(scores["embedding"].to_numpy().tolist()).astype(float)
    index = {i: n for n, i in enumerate(scores["row_id"].to_pylist())}
    centre = np.array([index[c["centre"]] for c in report["by_cluster"]])
    sigma = scores["loss"].to_numpy()[centre][label] + 0.5 * np.linalg.norm(points - points[centre[label]], axis=1) ** 2
    expected = np.maximum(sigma / sigma.sum(), 0.02 / 40)
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-4)
    assert [c["size"] for c in report["by_cluster"]] == np.bincount(label).tolist()
    assert [c["drawn"] for c in report["by_cluster"]] == np.bincount(label, weights=times).tolist()


def test_the_same_seed_draws_the_same_rows_in_any_order_of_the_data(tmp_path, tiny_model):
    rows = some_rows(40)
    first, again, mixed = sample(tmp_path, tiny_model, rows), sample(tmp_path, tiny_model, rows), sample(tmp_path, tiny_model, rows[::-1])
    assert first.file("clusters.parquet").read_bytes() == again.file("clusters.parquet").read_bytes() == mixed.file("clusters.parquet").read_bytes()
    other = sample(tmp_path, tiny_model, rows, seed=1)
    assert other.file("clusters.parquet").read_bytes() != first.file("clusters.parquet").read_bytes()


def test_tolerance_and_epsilon_stand_for_clusters_and_draws(tmp_path, tiny_model):
    out = sample(tmp_path, tiny_model, some_rows(30), clusters=None, tolerance=0.4, epsilon=0.4, budget=None)
    report = out.json("sensitivity.json")
    assert report["drawn"] == draws_for(0.4) == 15 and report["epsilon"] <= 0.4
    assert 1 < report["clusters"] < 30 and report["oracle_calls"] == report["clusters"]
    table = score_rows(RowSet(rows_artifact(tmp_path, some_rows(30))), context(tmp_path / "c"), model=str(tiny_model), want=("embedding",))
    points = np.stack(table["embedding"].to_numpy().tolist()).astype(float)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    mean = points.mean(axis=0)
    centre = points[np.linalg.norm(points - mean, axis=1).argmin()]
    assert report["cost"] <= 0.4 * (np.linalg.norm(points - centre, axis=1) ** 2).sum()
    assert slots.parse("curate", {"sensitivity_sampling": {"tolerance": 0.1, "epsilon": 0.2}}).clusters is None
    for wrong in ({"clusters": 3, "tolerance": 0.1, "epsilon": 0.2}, {"clusters": None, "epsilon": 0.2}, {}, {"epsilon": 0.2, "budget": {"rows": 3}}):
        with pytest.raises(ValueError, match="give either"):
            slots.parse("curate", {"sensitivity_sampling": wrong})


def test_a_row_drawn_twice_is_seen_twice_and_a_token_budget_is_kept(tmp_path, tiny_model):
    out = sample(tmp_path, tiny_model, some_rows(20), budget={"tokens": 790})
    with RowSet(out).view() as con:
        times = [t for t, in con.execute("select times from rows where split = 'train'").fetchall()]
    assert sum(times) == 19 and max(times) > 1
    assert out.counts["used_tokens"] == 19 * 40


def test_what_cannot_be_sampled_is_said(tmp_path, tiny_model):
    with pytest.raises(DataError, match="fewer than the 50 clusters"):
        sample(tmp_path, tiny_model, some_rows(20), clusters=50)
    with pytest.raises(DataError, match="smaller than the first row drawn"):
        sample(tmp_path, tiny_model, some_rows(20), budget={"tokens": 39})
    with pytest.raises(ValueError, match="either hoelder or probes"):
        module.SensitivitySampling(clusters=2, budget={"rows": 1}, hoelder=1, probes=1)
    out = sample(tmp_path, tiny_model, [*some_rows(20), SILENT])
    silent, = (line for line in decisions(out).values() if line["reason"] == "no loss: nothing is trained on")
    assert not silent["kept"] and silent["score"] is None

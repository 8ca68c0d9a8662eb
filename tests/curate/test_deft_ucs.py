"""DEFT-UCS: a seed set, and the ends of clusters of the rest."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from ftpipe.curate.select.deft_ucs import core_set, cosine_distance, places
from ftpipe.data.render import Renderer
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from ftpipe.models.loading import load_model, load_tokenizer
from ftpipe.stages.base import Environment
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step, text
from tests.models.data import WORDS


@pytest.fixture(scope="module")
def clustered():
    """Distances and labels of 100 points in clusters of 2 to 30."""
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat(np.arange(6), [2, 5, 11, 22, 30, 30]))
    return rng.uniform(0, 2, 100), label


@pytest.mark.parametrize("easy", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("amount", [0, 1, 4, 7, 50])
def test_each_cluster_gives_its_nearest_and_its_farthest(clustered, easy, amount):
    distance, label = clustered
    near, hard = core_set(*places(distance, label), amount, easy)
    assert not (near & hard).any()
    for i in range(6):
        own = label == i
        wanted = round(easy * amount) if easy * amount % 1 != 0.5 else int(easy * amount + 0.5)
        if own.sum() <= amount:
            assert (near | hard)[own].all()
            continue
        assert (near & own).sum() == wanted and (hard & own).sum() == amount - wanted
        rest = distance[own & ~near & ~hard]
        assert not (near & own).any() or distance[near & own].max() <= rest.min()
        assert not (hard & own).any() or rest.max() <= distance[hard & own].min()
    assert (near | hard).sum() == sum(min(amount, int((label == i).sum())) for i in range(6))


def test_a_larger_amount_holds_a_smaller_one_and_the_two_ends_are_apart(clustered):
    distance, label = clustered
    near, far, size = places(distance, label)
    before = np.zeros(100, dtype=bool)
    for amount in range(32):
        now = np.logical_or(*core_set(near, far, size, amount, 0.37))
        assert (now | ~before).all()
        before = now
    assert before.all()
    (easy, _), (_, hard) = core_set(near, far, size, 11, 1.0), core_set(near, far, size, 11, 0.0)
    large = size >= 22
    assert not (easy & hard & large).any() and (easy & large).sum() == (hard & large).sum() == 33


def test_cosine_distances_to_the_centroid_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    points, label = rng.normal(size=(30, 4)), np.repeat([0, 1, 2], 10)
    points[0] = 0
    for i, found in enumerate(cosine_distance(points, label)):
        centre = points[label == label[i]].mean(axis=0)
        expected = 1 - points[i] @ centre / np.linalg.norm(points[i]) / np.linalg.norm(centre) if i else 1
        assert found == pytest.approx(expected, abs=1e-12)
    # equal distances go by order
    near, far, _ = places(np.zeros(4), np.array([0, 1, 0, 0]))
    assert near.tolist() == [0, 0, 1, 2] and far.tolist() == [2, 0, 1, 0]


def asked(n: int = 40, shift: int = 0) -> list[dict]:
    """Questions of two kinds, each with another row's answer for a `shift` other than 0."""
    rng = np.random.default_rng(5)
    answers = [" ".join(rng.choice(WORDS, size=4)) for _ in range(n)]
    return [chat(f"What does {WORDS[i % len(WORDS)]}_{i} do?" if i % 2 else f"{i} + {i * 7} * {i * i} = ", answers[(i + shift) % n]) for i in range(n)]


def deft(tmp_path, model, rows, *, seed=1, **settings):
    step = {"deft_ucs": {"clusters": 3, "budget": {"rows": 16}, "base": 0.25} | settings}
    return run_step(tmp_path, rows_artifact(tmp_path, rows, annotations={"tokens": [20] * len(rows)}), step, model=str(model), seed=seed)


def parts(out) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in pq.read_table(out.file("annotations.parquet")).to_pylist():
        found.setdefault(line["deft_part"] or "", []).append(line["row_id"])
    return found


def test_answers_have_no_part_in_the_choice(tmp_path, tiny_model):
    def questions(out):
        with RowSet(out).view() as con:
            return sorted(q for q, in con.execute("select messages[1].content from rows where split = 'train'").fetchall())

    one, other = (deft(tmp_path, tiny_model, asked(shift=s), easy=0.5, clusters=9, budget={"rows": 26}) for s in (0, 11))
    assert questions(one) == questions(other) and set(kept_ids(one)).isdisjoint(kept_ids(other))
    assert questions(deft(tmp_path, tiny_model, asked(), easy=0.5, clusters=9, budget={"rows": 26}, seed=2)) != questions(one)


def test_the_seed_set_and_the_core_set_are_apart_and_fill_the_budget(tmp_path, tiny_model):
    out = deft(tmp_path, tiny_model, asked(), easy=0.5)
    part, report = parts(out), out.json("deft_ucs.json")
    assert len(part["seed"]) == 4 == report["seed_rows"]
    taken = [*part["seed"], *part.get("easy", []), *part.get("hard", [])]
    assert len(set(taken)) == len(taken) and set(kept_ids(out)) == set(taken)
    notes = {r["row_id"]: r for r in pq.read_table(out.file("annotations.parquet")).to_pylist()}
    assert all(notes[i]["deft_cluster"] is None and notes[i]["centroid_distance"] is None for i in part["seed"]), "the seed set is not clustered"
    size = Counter(n["deft_cluster"] for n in notes.values() if n["deft_cluster"] is not None)
    quotas = [sum(min(a, s) for s in size.values()) for a in range(41)]
    amount = max(a for a, q in enumerate(quotas) if 4 + q <= 16)
    assert report["per_cluster"] == amount >= 4 and len(taken) == 4 + quotas[amount] and report["easy_rows"] + report["hard_rows"] == quotas[amount]
    for cluster in size:
        inside = {p: [notes[i]["centroid_distance"] for i in rows if notes[i]["deft_cluster"] == cluster] for p, rows in part.items()}
        if size[cluster] > amount:
            assert max(inside["easy"]) <= min(inside[""]) and max(inside[""]) <= min(inside["hard"])


def test_distances_are_between_embeddings_of_prompts(tmp_path, tiny_model):
    """The mean last hidden state of what stands before the answer, from a forward pass of its own."""
    rows = complete([*asked(12), text("a text without an answer")])
    out = deft(tmp_path, tiny_model, rows, clusters=1, base=0.0, budget={"rows": 5})
    env = Environment(tmp_path, tmp_path, "test")
    import torch

    model, renderer = load_model(str(tiny_model), env, dtype="bfloat16", device="cpu"), Renderer(load_tokenizer(str(tiny_model), env))
    points = []
    for row in rows:
        ids = renderer.row(row).input_ids if row["format"] == "text" else renderer.prompt(row["messages"][:1])
        with torch.inference_mode():
            points.append(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].float().mean(0).numpy().astype(float))
    points = np.stack(points) / np.linalg.norm(points, axis=1, keepdims=True)
    centre = points.mean(axis=0)
    found = decisions(out)
    for row, point in zip(rows, points):
        assert found[row["row_id"]]["score"] == pytest.approx(1 - point @ centre / np.linalg.norm(centre), rel=0.01)  # rounding in bf16
    assert set(kept_ids(out)) == {i for i, _ in sorted(found.items(), key=lambda e: -e[1]["score"])[:5]}, "hard rows only, by default"


def test_tokens_are_a_budget_too_and_what_does_not_fit_is_said(tmp_path, tiny_model):
    out = deft(tmp_path, tiny_model, asked(), budget={"tokens": 340})
    assert out.counts["used_tokens"] <= 340 and out.counts["used_tokens"] > 340 - 20 * 4
    assert len(parts(out)["seed"]) == 4  # a quarter of 340 tokens
    with pytest.raises(DataError, match="fewer than the 39 clusters"):
        deft(tmp_path, tiny_model, asked(), clusters=39, budget={"rows": 20})
    with pytest.raises(DataError, match="neither a seed nor a row of each of 3"):
        deft(tmp_path, tiny_model, asked(), budget={"rows": 2}, base=0.0)
    twice = [chat("the same question", f"answer {i}") for i in range(6)]
    assert len(kept_ids(deft(tmp_path, tiny_model, [*asked(20), *twice], budget={"rows": 12}))) <= 12

"""Deduplication by embeddings, on planted ones."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from ftpipe.curate.dedup import semantic
from ftpipe.data.rows import RowSet
from tests.artifacts import decisions, kept_ids, rows_artifact, run_step, text


def unit(points: np.ndarray) -> np.ndarray:
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def families(seed: int, groups: int = 40, d: int = 12) -> np.ndarray:
    """Vectors around random centres, at cosines on both sides of 0.9."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(groups, d)))
    return unit(np.repeat(centres, 6, axis=0) + rng.normal(size=(6 * groups, d)) * rng.choice([0.02, 0.1, 0.2], size=(6 * groups, 1)))


@pytest.mark.parametrize("fixed", [0, 30])
@pytest.mark.parametrize("block", [7, 512])
def test_greedy_is_a_plain_loop(fixed, block):
    points = np.random.default_rng(3).permutation(families(1))
    cosine = points.astype(np.float64) @ points.T.astype(np.float64)
    stays = list(range(fixed))
    for i in range(fixed, len(points)):
        if not stays or cosine[i, stays].max() < 0.9:
            stays.append(i)
    gone, keeper, likeness = semantic.greedy(points, 0.9, fixed, block=block)
    assert sorted({*range(len(points))} - {*gone.tolist()}) == stays and 40 < len(gone) < 200
    assert {*keeper.tolist()} <= {*stays} and (keeper < gone).all()
    assert likeness == pytest.approx(cosine[gone, keeper], abs=1e-12) and (likeness >= 0.9).all()


def test_many_alike_cost_no_more_than_others(monkeypatch):
    rng = np.random.default_rng(0)
    asked = []
    exact = semantic.exact
    monkeypatch.setattr(semantic, "exact", lambda points, a, b, **k: asked.append(len(a)) or exact(points, a, b, **k))
    gone, keeper, _ = semantic.greedy(unit(np.ones(8) + 0.01 * rng.normal(size=(5000, 8))), 0.9, block=64)
    assert gone.tolist() == list(range(1, 5000)) and not keeper.any()
    assert sum(asked) < 5000 + 64 * 64


@pytest.fixture
def planted(monkeypatch):
    """Embeddings by text, in place of the model's."""
    known: dict[str, np.ndarray | None] = {}

    def score_rows(rows: RowSet, ctx, *, model, split, want):
        assert want == ("embedding",)
        table = rows.table(split, ["row_id", "text"]).sort_by("row_id")
        return pa.table({"row_id": table["row_id"], "embedding": pa.array([known[t] for t in table["text"].to_pylist()], pa.list_(pa.float32()))})

    monkeypatch.setattr("ftpipe.models.scores.score_rows", score_rows)
    return known


def test_keeps_one_of_each_family_and_names_it(tmp_path, planted):
    points = unit(families(5, d=24) + 3 * np.eye(24)[0])  # all share a large part, which `centre` takes away
    planted |= {f"row {i}": p for i, p in enumerate(points)} | {"unread": None}
    source = rows_artifact(tmp_path, [text(t) for t in planted])
    ids = kept_ids(source)
    shared = points - points.mean(axis=0)
    cosine = unit(shared).astype(np.float64) @ unit(shared).T.astype(np.float64)
    rank = sorted(range(240), key=lambda i: ids[i])
    stays: list[int] = []
    for i in rank:
        if not any(cosine[i, k] >= 0.9 for k in stays):
            stays.append(i)
    made = run_step(tmp_path, source, {"semantic": {"threshold": 0.9}})
    assert set(kept_ids(made)) == {ids[i] for i in stays} | {ids[240]} and 40 <= len(stays) < 200
    lost = {row: v for row, v in decisions(made).items() if not v["kept"]}
    at = {row: i for i, row in enumerate(ids)}
    for row, v in lost.items():
        assert v["reason"] == "means the same" and at[v["keeper"]] in stays and v["score"] == pytest.approx(cosine[at[row], at[v["keeper"]]], abs=1e-6)
    assert made.json("semantic.json") == {"clusters": 1, "largest_cluster": 240, "embedded": 240, "dropped": len(lost)}
    # families lie far apart: clusters lose few of the pairs, and drop nothing that one cluster would not find near
    parts = run_step(tmp_path, source, {"semantic": {"threshold": 0.9, "rows_per_cluster": 60}})
    assert parts.json("semantic.json")["clusters"] == 4
    found = {row: v for row, v in decisions(parts).items() if not v["kept"]}
    assert len(found) > 0.9 * len(lost) and all(cosine[at[r], at[v["keeper"]]] >= 0.9 - 1e-6 for r, v in found.items())
    # without centring nearly everything is like everything
    assert run_step(tmp_path, source, {"semantic": {"threshold": 0.8, "centre": False}}).counts["rows_kept"] < 20


def test_rows_of_other_sets_come_first(tmp_path, planted):
    e = np.eye(6, dtype=np.float32)
    planted |= {"held": e[0], "a": e[0] + 0.01 * e[5], "bench": e[1], "b": e[1] + 0.01 * e[5], "c": e[2], "d": e[2] + 0.01 * e[5], "free": e[3]}
    bench = rows_artifact(tmp_path, [text("bench")], name="bench")
    source = rows_artifact(tmp_path, [text("held", split="heldout"), *(text(t) for t in ("a", "b", "c", "d", "free"))])
    a, b, c, d, free = kept_ids(source)
    made = run_step(tmp_path, source, {"semantic": {"heldout": True, "against": ["bench"], "centre": False}}, bench=bench)
    assert set(kept_ids(made)) == {min(c, d), free}
    verdicts = decisions(made)
    assert verdicts[a]["keeper"] == kept_ids(source, "heldout")[0] and verdicts[a]["reason"] == "means the same of a held-out row"
    assert verdicts[b]["keeper"] == kept_ids(bench)[0] and verdicts[b]["reason"] == "means the same of a row of bench"

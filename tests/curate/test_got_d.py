"""GOT-D: the transport against brute force and finite differences, what its gradient means, and the step on planted rows."""

from __future__ import annotations

import logging
import string

import numpy as np
import pyarrow.parquet as pq
import pytest

from ftpipe.curate.select import got_d
from ftpipe.curate.select._transport import Potentials, calibrated, mean_cost, sinkhorn, value
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from ftpipe.models.scores import score_rows
from ftpipe.stages.base import Listener
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step
from tests.models.data import context

TIGHT = {"tolerance": 1e-11, "max_iterations": 20_000}


@pytest.fixture(scope="module")
def clouds() -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(0)
    target, pool = rng.normal(size=(12, 3)), rng.normal(size=(25, 3)) * 1.3 + 0.4
    return target, pool, 0.1 * mean_cost(target, pool)


def dense(target: np.ndarray, pool: np.ndarray, epsilon: float, passes: int = 3000) -> tuple[np.ndarray, np.ndarray, float]:
    """f, g and the value, with the whole matrix in memory, kernels instead of logarithms, and the value from the plan's definition."""
    cost = ((target[:, None] - pool[None]) ** 2).sum(-1)
    a, b = np.full(len(target), 1 / len(target)), np.full(len(pool), 1 / len(pool))
    kernel, u, v = np.exp(-cost / epsilon), np.ones(len(target)), np.ones(len(pool))
    for _ in range(passes):
        v = 1 / (kernel.T @ (a * u))
        u = 1 / (kernel @ (b * v))
    plan = (a * u)[:, None] * kernel * (b * v)[None]
    return epsilon * np.log(u), epsilon * np.log(v), float((plan * cost).sum() + epsilon * (plan * np.log(plan / (a[:, None] * b[None]))).sum())


def test_potentials_and_value_are_those_of_brute_force(clouds):
    target, pool, epsilon = clouds
    f, g, truth = dense(target, pool, epsilon)
    assert mean_cost(target, pool) == pytest.approx(((target[:, None] - pool[None]) ** 2).sum(-1).mean(), rel=1e-12)
    for options in ({}, {"momentum": 1.3}, {"momentum": 1.7}, {"block": 12 * 4}, {"block": 1}):
        found = sinkhorn(target, pool, epsilon=epsilon, **TIGHT, **options)
        assert found.error < 1e-11 and value(found) == pytest.approx(truth, abs=1e-9), options
        np.testing.assert_allclose(found.pool - found.pool.mean(), g - g.mean(), atol=1e-8)
        np.testing.assert_allclose(found.target - found.target.mean(), f - f.mean(), atol=1e-8)


def test_over_relaxation_saves_passes_and_a_limit_is_kept(clouds):
    target, pool, epsilon = clouds
    slow, fast = (sinkhorn(target, pool, epsilon=0.1 * epsilon, momentum=w, tolerance=1e-8, max_iterations=20_000) for w in (1.0, 1.3))
    assert fast.iterations < 0.8 * slow.iterations and max(slow.error, fast.error) < 1e-8
    cut = sinkhorn(target, pool, epsilon=0.1 * epsilon, momentum=1.3, tolerance=1e-12, max_iterations=9)
    assert cut.iterations == 9 and cut.error > 1e-12
    cost = ((target[:, None] - pool[None]) ** 2).sum(-1)
    mass = np.exp((cut.target[:, None] + cut.pool[None] - cost) / (0.1 * epsilon)) / cost.size
    np.testing.assert_allclose(mass.sum(0), 1 / len(pool), rtol=1e-9)  # the pool's side is met whether or not it converged
    assert np.abs(mass.sum(1) - 1 / len(target)).sum() == pytest.approx(cut.error, rel=1e-9)


def test_the_gradient_is_that_of_finite_differences(clouds):
    target, pool, epsilon = clouds
    found, n = sinkhorn(target, pool, epsilon=epsilon, **TIGHT), len(pool)
    h = 1e-3 / n
    for i, j in ((0, 1), (5, 20), (24, 3), (7, 7 - 1)):
        shifted = []
        for sign in (1, -1):
            weights = np.full(n, 1 / n)
            weights[i] += sign * h
            weights[j] -= sign * h
            shifted.append(value(sinkhorn(target, pool, epsilon=epsilon, weights=weights, **TIGHT), weights))
        assert (shifted[0] - shifted[1]) / (2 * h) == pytest.approx(found.pool[i] - found.pool[j], abs=1e-3 * np.ptp(found.pool))


def test_calibrated_and_raw_ranks_are_one_and_a_constant_does_not_count():
    g = np.random.default_rng(3).normal(size=50)
    score = calibrated(g)
    np.testing.assert_allclose(score, [g[i] - np.delete(g, i).sum() / 49 for i in range(50)], atol=1e-12)
    np.testing.assert_array_equal(np.argsort(score), np.argsort(g))
    np.testing.assert_allclose(calibrated(g + 7.5), score, atol=1e-12)
    assert calibrated(g[:1]) == [0.0]


def test_mass_on_the_lowest_brings_the_clouds_closer_and_on_the_highest_apart(clouds):
    target, pool, epsilon = clouds
    found, n = sinkhorn(target, pool, epsilon=epsilon, **TIGHT), len(pool)
    order = np.argsort(calibrated(found.pool))

    def moved(points: np.ndarray, share: float = 0.05) -> float:
        weights = np.full(n, (1 - share) / n)
        weights[points] += share / len(points)
        return value(sinkhorn(target, pool, epsilon=epsilon, weights=weights, **TIGHT), weights)

    assert moved(order[:5]) < value(found) < moved(order[-5:])


def test_a_covered_mode_is_worth_less_than_one_that_is_not():
    """Both modes of the target have pool rows at the same distances; one has eight times as many."""
    rng = np.random.default_rng(0)
    offsets, near = rng.normal(size=(10, 2)), rng.normal(size=(4, 2)) * 0.5
    modes = np.array([[-6.0, 0.0], [6.0, 0.0]])
    target = np.concatenate([m + offsets for m in modes])
    pool = np.concatenate([np.repeat(modes[0] + near, 8, axis=0), modes[1] + near])
    nearest = np.sqrt(((pool[:, None] - target[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(np.sort(np.unique(nearest.round(9))), np.sort(np.unique(nearest[-4:].round(9))))
    found = sinkhorn(target, pool, epsilon=0.05 * mean_cost(target, pool), **TIGHT)
    score = calibrated(found.pool)
    assert score[-4:].max() < score[:-4].min() - 1, "nearest neighbours see no difference"


# --- the step


def planted() -> tuple[list[dict], list[dict]]:
    """A pool mostly of digits with a few rows of words, and a target of words."""
    rng = np.random.default_rng(4)

    def words(n: int) -> list[dict]:
        return [chat(f"word {i}?", " ".join(rng.choice(["apple", "pear", "plum", "grape"], size=8))) for i in range(n)]

    digits = [chat(f"{i}?", "".join(rng.choice(list(string.digits), size=40))) for i in range(18)]
    return digits + words(6), words(5)


def test_the_step_takes_what_the_target_lacks_and_says_why(tmp_path, tiny_model):
    pool, target = planted()
    source, goal = rows_artifact(tmp_path, pool), rows_artifact(tmp_path, target, name="goal")
    out = run_step(tmp_path, source, {"got_d": {"target": "goal", "budget": {"rows": 6}, "tolerance": 1e-9}}, model=str(tiny_model), goal=goal)
    ids = [r["row_id"] for r in complete(pool)]
    assert sorted(kept_ids(out)) == sorted(ids[18:])
    ctx = context(tmp_path)
    x, y = (np.stack(score_rows(RowSet(a), ctx, model=str(tiny_model), want=("embedding",))["embedding"].to_numpy()).astype(float) for a in (goal, source))
    said = out.json("got_d.json")
    assert said["epsilon"] == pytest.approx(0.05 * ((x[:, None] - y[None]) ** 2).sum(-1).mean(), rel=1e-6) and said["converged"]
    _, g, distance = dense(x, y, said["epsilon"], 20_000)
    found = decisions(out)
    np.testing.assert_allclose([found[i]["score"] for i in sorted(ids)], calibrated(g), atol=1e-5 * np.ptp(g))
    assert said["distance"] == pytest.approx(distance, rel=1e-5) and said["slope"] < 0
    assert {v["reason"] for v in found.values()} == {None, "others bring the pool closer to the target"}
    assert pq.read_table(out.file("annotations.parquet"))["transport_gradient"].to_pylist() == [found[i]["score"] for i in sorted(ids)]


def test_without_a_target_the_held_out_rows_are_it(tmp_path, tiny_model):
    pool, target = planted()
    mute = {"format": "messages", "messages": [{"role": "user", "content": "hello?"}]}
    together = rows_artifact(tmp_path, [*pool, mute, *({**r, "split": "heldout"} for r in target)])
    settings = {"budget": {"rows": 6}, "normalize": True, "absolute": True, "epsilon": 0.01}
    out = run_step(tmp_path, together, {"got_d": settings}, model=str(tiny_model))
    assert out.json("got_d.json")["target_rows"] == 5 and out.json("got_d.json")["epsilon"] == 0.01
    named = run_step(tmp_path, rows_artifact(tmp_path, [*pool, mute]), {"got_d": settings | {"target": "goal"}}, model=str(tiny_model),
                     goal=rows_artifact(tmp_path, target, name="goal"))
    assert kept_ids(out) == kept_ids(named) and len(kept_ids(out)) == 6
    assert [v["score"] for v in decisions(named).values() if v["reason"] == got_d.UNKNOWN] == [None]
    with pytest.raises(DataError, match="holds no row that can be embedded"):
        run_step(tmp_path, rows_artifact(tmp_path, pool), {"got_d": settings}, model=str(tiny_model))


def test_going_on_after_any_pass_gives_the_same_bytes(clouds):
    target, pool, epsilon = clouds
    states: list[Potentials] = []
    whole = sinkhorn(target, pool, epsilon=0.3 * epsilon, momentum=1.3, tolerance=1e-6, after=states.append)
    assert len(states) == whole.iterations - 1 > 10
    for state in states[::7]:
        resumed = sinkhorn(target, pool, epsilon=0.3 * epsilon, momentum=1.3, tolerance=1e-6, start=state)
        assert resumed.iterations == whole.iterations and resumed.error == whole.error
        assert resumed.pool.tobytes() == whole.pool.tobytes() and resumed.target.tobytes() == whole.target.tobytes()


class Stops(Listener):
    """Stops the stage at its fifth pass."""

    def __init__(self) -> None:
        self.passes: list[float] = []

    def progress(self, name, done, total, unit, metrics):
        self.passes += [done] * (unit == "passes")
        if done == 5 and unit == "passes":
            raise KeyboardInterrupt


def test_a_stopped_step_goes_on_where_it_was(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(got_d, "SAVE_SECONDS", 0.0)
    pool, target = planted()
    source, goal = rows_artifact(tmp_path, pool), rows_artifact(tmp_path, target, name="goal")
    step = got_d.GotD(target="goal", budget={"rows": 6}, tolerance=1e-9)
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    ctx = StepContext(**vars(context(tmp_path)), method="got_d", model=str(tiny_model))
    ctx.inputs, ctx.log, ctx.listener = {"goal": goal}, logging.getLogger("test"), Stops()
    with pytest.raises(KeyboardInterrupt):
        step.apply(RowSet(source), ctx)
    ctx.listener.passes.clear()
    with pytest.raises(KeyboardInterrupt):  # the pass that was not saved is made again
        step.apply(RowSet(source), ctx)
    assert ctx.listener.passes == [5]
    ctx.listener = Listener()
    step.apply(RowSet(source), ctx)
    whole = run_step(tmp_path, source, step, model=str(tiny_model), goal=goal)
    for name in ("annotations.parquet", "kept.parquet", "got_d.json"):
        assert (tmp_path / "out" / name).read_bytes() == whole.file(name).read_bytes()

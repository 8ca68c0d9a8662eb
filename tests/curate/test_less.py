"""LESS: gradients, their projection, AdamW's update, and the rows that come first."""

from __future__ import annotations

import json
import uuid

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ftpipe.curate.gradients import AdamState, RowGradients, Sketch
from ftpipe.curate.select.less import similarities
from ftpipe.data.render import Renderer
from ftpipe.errors import ConfigError, DataError
from ftpipe.models.loading import load_adapted, load_tokenizer
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Environment
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step
from tests.models.data import trained_adapter

SILENT = {"format": "messages", "messages": [{"role": "user", "content": "hello?"}]}
WORDS = ["red", "blue", "green", "white", "black", "brown"]


def letters(i: int, word: str = "colour") -> dict:
    rng = np.random.default_rng(i)
    return chat(f"name a {word} {i}", " ".join(rng.choice(WORDS, size=3 + i % 4)), source="letters.jsonl")


def digits(i: int, word: str = "number") -> dict:
    rng = np.random.default_rng(1000 + i)
    return chat(f"give a {word} {i}", " ".join(str(n) for n in rng.integers(100, 9999, size=3 + i % 4)), source="digits.jsonl")


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """Rows of two kinds, a warm-up on some of both, and target rows of each kind."""
    workspace = tmp_path_factory.mktemp("less")
    rows = [kind(i) for i in range(10) for kind in (letters, digits)]
    warm = trained_adapter(workspace, tiny_model, [kind(100 + i) for i in range(3) for kind in (letters, digits)], steps=15, rate=3e-3)
    targets = {k: rows_artifact(workspace, [f(i) for i in range(200, 204)], name=k) for k, f in (("words", letters), ("numbers", digits))}
    targets["both"] = rows_artifact(workspace, [f(i) for i in range(200, 204) for f in (letters, digits)], name="both")
    return workspace, rows, {"warm": warm} | targets


def less(world, tiny_model, rows=None, *, target="words", reference="warm", references=None, seed=3, **settings):
    workspace, own, stages = world
    stages = stages | (references or {})
    named = [reference] if isinstance(reference, str) else reference
    step = {"less": {"reference": reference, "target": target, "budget": {"rows": 10}, "dtype": "float32", "dimensions": 0} | settings}
    return run_step(workspace, rows_artifact(workspace, rows or own), step, model=str(tiny_model), seed=seed,
                    **{n: stages[n] for n in (*named, *([target] if target else []))})


class Plain:
    """Losses and gradients of rows by the shortest way: transformers' own loss, one row at a time, everything in float32."""

    def __init__(self, world, tiny_model, reference="warm"):
        workspace, _, stages = world
        env = Environment(workspace, workspace, "test")
        self.model = load_adapted(str(tiny_model), env, stages[reference].file("adapter"), dtype="float32", device="cpu")
        self.renderer = Renderer(load_tokenizer(str(tiny_model), env))
        self.parameters = {n: p.requires_grad_(True) for n, p in sorted(self.model.named_parameters()) if "lora_" in n}

    def loss(self, row: dict):
        shown = self.renderer.row(row)
        labels = [t if on else -100 for t, on in zip(shown.input_ids, shown.trained)]
        return self.model(input_ids=torch.tensor([shown.input_ids]), labels=torch.tensor([labels])).loss

    def gradient(self, row: dict) -> np.ndarray:
        return self.flat(torch.autograd.grad(self.loss(row), list(self.parameters.values())))

    @staticmethod
    def flat(tensors) -> np.ndarray:
        return np.concatenate([t.detach().numpy().ravel() for t in tensors]).astype(np.float64)


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def truth(world, tiny_model):
    """Exact gradients of all rows by row_id, and the target's."""
    plain = Plain(world, tiny_model)
    by_row = {full["row_id"]: plain.gradient(full) for full in complete(world[1])}
    target = np.mean([plain.gradient(letters(i)) for i in range(200, 204)], axis=0)
    return plain, by_row, target


def test_scores_are_cosines_of_gradients_and_the_targets_kind_comes_first(world, tiny_model, truth):
    _, by_row, target = truth
    out = less(world, tiny_model)
    score = {i: line["score"] for i, line in decisions(out).items()}
    for row_id, gradient in by_row.items():
        assert score[row_id] == pytest.approx(cosine(gradient, target), abs=2e-4)
    ids = [r["row_id"] for r in complete(world[1])]
    kind = {"words": ids[::2], "numbers": ids[1::2]}
    assert sorted(kept_ids(out)) == sorted(kind["words"])
    assert min(score[i] for i in kind["words"]) > max(score[i] for i in kind["numbers"]) + 0.02
    assert sorted(kept_ids(less(world, tiny_model, target="numbers"))) == sorted(kind["numbers"])
    report = out.json("less.json")
    assert report["update"] == "gradient" and report["chosen"] == 10 and report["references"] == [{"stage": "warm", "weight": 1.0}]


def test_the_score_is_the_first_order_change_of_the_targets_loss(world, tiny_model, truth):
    """Central differences: the mean loss of the target rows after a small step down a row's gradient, and up it."""
    plain, by_row, target = truth
    score = {i: line["score"] for i, line in decisions(less(world, tiny_model)).items()}

    def target_loss() -> float:
        with torch.no_grad():
            return float(np.mean([plain.loss(letters(i)).double().item() for i in range(200, 204)]))

    def move(direction: np.ndarray, length: float) -> None:
        at = 0
        for p in plain.parameters.values():
            p.data += length * torch.tensor(direction[at:at + p.numel()], dtype=torch.float32).view_as(p)
            at += p.numel()

    for row_id in list(by_row)[:4]:
        down = -by_row[row_id] / np.linalg.norm(by_row[row_id])
        length, losses = 2e-2, []
        for step in (length, -2 * length):
            move(down, step)
            losses.append(target_loss())
        move(down, length)
        change = (losses[0] - losses[1]) / (2 * length)
        assert change == pytest.approx(-score[row_id] * np.linalg.norm(target), rel=0.03)


def test_projected_similarities_are_within_the_error_of_a_random_projection(world, tiny_model, truth):
    _, by_row, target = truth
    for dimensions, seed in ((256, 3), (2048, 4)):
        out = less(world, tiny_model, dimensions=dimensions, seed=seed)
        error = np.array([line["score"] - cosine(by_row[i], target) for i, line in decisions(out).items()])
        assert 0 < np.sqrt((error ** 2).mean()) < 2 * dimensions ** -0.5 and np.abs(error).max() < 4 * dimensions ** -0.5
        assert out.json("less.json")["projection_error"] == dimensions ** -0.5
    assert sorted(kept_ids(out)) == sorted(r["row_id"] for r in complete(world[1])[::2])


def test_the_sketch_keeps_inner_products_with_the_variance_that_it_states():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=40), rng.normal(size=40)
    found = np.array([Sketch.draw(40, 16, seed)(x) @ Sketch.draw(40, 16, seed)(y) for seed in range(4000)])
    variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x ** 2) @ (y ** 2)) / 16
    assert found.mean() == pytest.approx(x @ y, abs=5 * np.sqrt(variance / 4000))
    assert found.var() == pytest.approx(variance, rel=0.1)
    sketch = Sketch.draw(40, 16, 7)
    np.testing.assert_allclose(sketch(2 * x - y), 2 * sketch(x) - sketch(y), atol=1e-12)


def test_similarities_of_nothing_are_unknown():
    found = similarities(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 4.0], [-4.0, 3.0]]))
    np.testing.assert_allclose(found[0], [1, 0], atol=1e-15)
    assert np.isnan(found[1]).all()


def test_the_adam_update_is_the_step_that_torch_would_take():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    for _ in range(3):
        parameter.grad = torch.randn(50, dtype=torch.float64)
        optimizer.step()
    held = optimizer.state[parameter]
    state = AdamState(held["exp_avg"].numpy().copy(), held["exp_avg_sq"].numpy().copy(), int(held["step"]), 0.8, 0.95, 1e-6)
    gradient, before = torch.randn(50, dtype=torch.float64), parameter.detach().clone()
    expected = state.update(gradient.numpy())
    parameter.grad = gradient
    optimizer.step()
    np.testing.assert_allclose((before - parameter.detach()).numpy() / 1e-3, expected, rtol=1e-6, atol=1e-9)


def with_state(world, tiny_model, truth, *, settings=None, keep=lambda name: True):
    """The warm-up's artifact again, as one of a train stage that kept its optimizer's state; and that state, flat."""
    workspace, _, stages = world
    plain, rng = truth[0], np.random.default_rng(5)
    from safetensors.torch import save_file

    state = {n: (torch.tensor(rng.normal(0, 1e-3, p.shape), dtype=torch.float32), torch.tensor(rng.uniform(1e-8, 1e-5, p.shape), dtype=torch.float32))
             for n, p in plain.parameters.items()}
    store, key = Store(workspace), uuid.uuid4().hex * 2
    with store.building("train", key) as out:
        import shutil

        shutil.copytree(stages["warm"].file("adapter"), out / "adapter")
        tensors = {f"{n}/{k}": t for n, (m, v) in state.items() if keep(n)
                   for k, t in (("exp_avg", m), ("exp_avg_sq", v), ("step", torch.tensor(15.0)))}
        save_file(tensors, out / "optimizer.safetensors")
        chosen = {"adamw": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}} if settings is None else settings
        (out / "train.json").write_text(json.dumps({"settings": {"optimizer": chosen}}))
        made = store.commit(out, kind="train", name="kept", key=key, material={}, inputs={}, counts={}, meta={}, notes={})
    return made, AdamState(*(Plain.flat([s[i] for s in state.values()]) for i in (0, 1)), 15, 0.9, 0.99, 1e-8)


def test_with_the_optimizers_state_rows_are_scored_by_the_update_that_adamw_would_make(world, tiny_model, truth):
    kept, state = with_state(world, tiny_model, truth)
    _, by_row, target = truth
    out = less(world, tiny_model, reference="kept", references={"kept": kept})
    assert out.json("less.json")["update"] == "adamw"
    for row_id, line in decisions(out).items():
        assert line["score"] == pytest.approx(cosine(state.update(by_row[row_id]), target), abs=1e-3)
    plain = less(world, tiny_model, reference="kept", references={"kept": kept}, adam=False)
    assert plain.json("less.json")["update"] == "gradient"
    for row_id, line in decisions(plain).items():
        assert line["score"] == pytest.approx(cosine(by_row[row_id], target), abs=2e-4)


def test_a_state_that_is_not_there_or_not_adams_is_refused(world, tiny_model, truth):
    with pytest.raises(ConfigError, match="state of the optimizer is not there"):
        less(world, tiny_model, adam=True)
    galore, _ = with_state(world, tiny_model, truth, settings={"q_galore": {}})
    partly, _ = with_state(world, tiny_model, truth, keep=lambda name: "lora_A" in name)
    for reference, why in ((galore, "not that of AdamW"), (partly, "not of the adapter's parameters")):
        with pytest.raises(ConfigError, match=why):
            less(world, tiny_model, reference="kept", references={"kept": reference})


def test_a_killed_run_goes_on_and_another_target_needs_no_new_gradients(world, tiny_model, monkeypatch):
    inner, done = RowGradients.vector, []

    def broken(self, row, adam):
        if len(done) == 13:
            raise KeyboardInterrupt
        done.append(1)
        return inner(self, row, adam)

    monkeypatch.setattr(RowGradients, "vector", broken)
    fresh = [kind(i, "thing") for i in range(10) for kind in (letters, digits)]
    with pytest.raises(KeyboardInterrupt):
        less(world, tiny_model, fresh)
    monkeypatch.setattr(RowGradients, "vector", inner)
    after = less(world, tiny_model, fresh)
    assert after.manifest["notes"]["gradients"] == 20 - 13  # the four of the target are known from before
    other = less(world, tiny_model, fresh, target="numbers", budget={"rows": 3})
    assert other.manifest["notes"]["gradients"] <= 4 and len(kept_ids(other)) == 3
    monkeypatch.setattr("ftpipe.curate.gradients.CHUNK_FLOATS", 1)  # one row at a time comes to the same
    assert kept_ids(less(world, tiny_model, fresh)) == kept_ids(after)


def test_each_kind_of_target_has_its_rows_and_the_best_counts(world, tiny_model):
    alone = [{i: d["score"] for i, d in decisions(less(world, tiny_model, target=t)).items()} for t in ("words", "numbers")]
    out = less(world, tiny_model, target="both", by="source")
    served = {r["row_id"]: r["influence_on"] for r in pq.read_table(out.file("annotations.parquet")).to_pylist()}
    for row_id, line in decisions(out).items():
        assert line["score"] == pytest.approx(max(a[row_id] for a in alone), abs=1e-12)
        assert served[row_id] == ("letters.jsonl" if alone[0][row_id] > alone[1][row_id] else "digits.jsonl")
    assert set(served.values()) == {"letters.jsonl", "digits.jsonl"}


def test_several_references_are_summed_with_their_learning_rates(world, tiny_model):
    import pyarrow as pa

    workspace, rows, stages = world
    later = trained_adapter(workspace, tiny_model, rows[:4], steps=25, rate=3e-3, name="later")
    found = []
    for artifact, rates in ((stages["warm"], [9.0, 1e-3, 3e-3]), (later, [5e-4])):
        store, key = Store(workspace), uuid.uuid4().hex * 2
        with store.building("train", key) as out:
            import shutil

            shutil.copytree(artifact.file("adapter"), out / "adapter")
            pq.write_table(pa.table({"epoch": [1, 2, 2][-len(rates):], "learning_rate": rates}), out / "metrics.parquet")
            found.append(store.commit(out, kind="train", name=artifact.name, key=key, material={}, inputs={}, counts={}, meta={}, notes={}))
    both = less(world, tiny_model, reference=["one", "two"], references={"one": found[0], "two": found[1]})
    single = [decisions(less(world, tiny_model, reference="one", references={"one": f})) for f in found]
    for row_id, line in decisions(both).items():  # 2e-3 and 5e-4
        assert line["score"] == pytest.approx(0.8 * single[0][row_id]["score"] + 0.2 * single[1][row_id]["score"], abs=1e-12)
    assert [r["weight"] for r in both.json("less.json")["references"]] == pytest.approx([0.8, 0.2])


def test_what_has_no_gradient_is_said(world, tiny_model):
    workspace, rows, _ = world
    out = less(world, tiny_model, [*rows[:6], SILENT], budget={"rows": 2})
    line, = (d for d in decisions(out).values() if d["reason"] == "no gradient: nothing is trained on")
    assert line["score"] is None and not line["kept"]
    with pytest.raises(DataError, match="no held-out rows to be the target"):
        less(world, tiny_model, target=None)
    mute = rows_artifact(workspace, [SILENT], name="mute")
    with pytest.raises(DataError, match="have no gradient"):
        less(world, tiny_model, target="mute", references={"mute": mute})
    with pytest.raises(ConfigError, match="makes no adapter"):
        less(world, tiny_model, reference="words")
    held = [*rows, *({**letters(i), "split": "heldout"} for i in range(200, 204))]
    assert sorted(kept_ids(less(world, tiny_model, held, target=None))) == sorted(r["row_id"] for r in complete(rows)[::2])

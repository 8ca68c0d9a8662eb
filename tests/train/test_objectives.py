"""Objectives and LoRA against what they are by definition."""

from __future__ import annotations

import math

import pytest

from ftpipe.train.objective.base import Example
from tests.train.small import examples, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")


def pairs(n: int = 8) -> list[Example]:
    good, bad = examples(n, seed=1), examples(n, seed=2)
    return [Example(g.row_id, (g.input_ids[0], b.input_ids[0]), (g.trained[0], b.trained[0])) for g, b in zip(good, bad)]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_dpo_starts_at_log_two_and_tells_the_answers_apart(model, zero):
    """At the start policy and reference are the same, so every pair's margin is 0 and its loss log 2."""
    run = small_run(model, objective="dpo", zero=zero)
    found = steps(run, pairs(), 8, rows_per_step=8)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert found[-1]["loss"] < found[0]["loss"] and found[-1]["margin"] > 0 and found[-1]["pairs_right"] == 1.0


def test_dpo_is_its_formula(model):
    """Loss and margin of a moved policy, pair by pair, with whole logits and a second copy of the base as reference."""
    import torch

    run = small_run(model, objective={"dpo": {"beta": 0.3}})
    steps(run, pairs(), 3, rows_per_step=8)
    base = run.load_base()

    def logp(m, ids, mask):
        logits = m(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        return sum(float(logits[i - 1, ids[i]]) for i in range(1, len(ids)) if mask[i])

    run.model.eval()
    with torch.no_grad():
        margins = [0.3 * ((logp(run.model, e.input_ids[0], e.trained[0]) - logp(base, e.input_ids[0], e.trained[0]))
                          - (logp(run.model, e.input_ids[1], e.trained[1]) - logp(base, e.input_ids[1], e.trained[1]))) for e in pairs()]
    run.model.train()
    found = steps(run, pairs(), 4, rows_per_step=8, first=3, rate=0.0)[0]
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 8, abs=1e-4)
    assert found["margin"] == pytest.approx(sum(margins) / 8, abs=1e-3)


def test_dpo_with_a_method_that_cannot_be_switched_off_keeps_a_second_copy(model):
    """Full fine-tuning: the reference stays where it was while the weights move."""
    run = small_run(model, objective="dpo", adapt="full")
    found = steps(run, pairs(), 4, rows_per_step=8, rate=1e-3)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found[-1]["margin"] > 0
    assert run.cache["dpo"] is not run.model


def test_dpo_reads_pairs_from_rows(tiny_model):
    from transformers import AutoTokenizer

    from ftpipe.data.render import Renderer
    from ftpipe.errors import DataError
    from ftpipe.train.objective.dpo import Dpo

    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_model))
    row = {"row_id": "a", "messages": [{"role": "user", "content": "2+2"}], "chosen": [{"role": "assistant", "content": "4"}],
           "rejected": [{"role": "assistant", "content": "five"}]}
    good, bad = Dpo().encode([row, row | {"row_id": "b", "rejected": []}], renderer)
    assert [sum(t) for t in good.trained] == [2, 5] and good.targets == 7
    assert isinstance(bad, DataError)


@pytest.fixture(scope="module")
def lora(model):
    return small_run(model, adapt={"lora": {"r": 4, "alpha": 12}})


def test_lora_starts_at_the_base_exactly(lora):
    import torch

    ids = torch.arange(5, 60)[None]
    lora.model.eval()
    with torch.no_grad():
        assert lora.model(input_ids=ids).logits.equal(lora.load_base()(input_ids=ids).logits)
    lora.model.train()


def test_lora_trains_r_times_inputs_and_outputs_of_each_target(lora):
    base = lora.load_base()
    expected = sum(4 * sum(m.weight.shape) for n, m in base.named_modules() if n.endswith("_proj"))
    assert sum(p.numel() for p in lora.trainable().values()) == expected


def test_lora_leaves_the_base_alone_and_changes_each_weight_by_rank_r_at_most(lora, tmp_path):
    import torch

    steps(lora, examples(), 5)
    base = lora.load_base()
    weights = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in lora.model.named_parameters() if not p.requires_grad}
    assert all(weights[n].equal(p) for n, p in base.named_parameters())
    lora.adapt.save(lora.model, lora.engine.state(), tmp_path)
    loaded = lora.adapt.load(lora.load_base(), tmp_path)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        adapted = loaded(input_ids=ids).logits
        merged = lora.adapt.merge(loaded)
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)
    changes = {n: p.detach() - dict(base.named_parameters())[n] for n, p in merged.named_parameters()}
    for name, change in changes.items():
        if name.endswith("_proj.weight"):
            values = torch.linalg.svdvals(change.double())
            assert values[0] > 0 and values[4:].max() < 1e-5 * values[0]
        else:
            assert not change.any()
    # The scale is alpha / r: the change is 3 B A.
    name = "model.layers.0.mlp.up_proj"
    state = lora.engine.state()
    product = 3.0 * state[f"base_model.model.{name}.lora_B.default.weight"] @ state[f"base_model.model.{name}.lora_A.default.weight"]
    torch.testing.assert_close(changes[f"{name}.weight"], product, rtol=1e-4, atol=1e-6)


def test_the_penalty_on_the_way_from_the_start_is_the_gradient_of_its_formula(model):
    """With a rate small enough, one step of plain SGD on loss + strength / 2 |theta - theta_0|^2 moves by the sum of both gradients."""
    run = small_run(model, regularizers=({"l2_start": {"strength": 0.5}},), clip=0.0)
    steps(run, examples(), 2)
    seen = {}
    regularizer = run.regularizers[0]
    type(regularizer).on_gradients, kept = (lambda self, r: (seen.update({n: r.engine.gradient(n) for n in r.engine.names}), kept(self, r))), \
        type(regularizer).on_gradients
    try:
        start = run.cache["l2_start"]
        values = {n: run.engine.value(n) for n in run.engine.names}
        after = {}
        original = run.engine.update
        run.engine.update = lambda: (after.update({n: run.engine.gradient(n) for n in run.engine.names}), original())
        record = steps(run, examples(), 3, first=2)[0]
    finally:
        type(regularizer).on_gradients = kept
    for name in values:
        assert (after[name] - seen[name] - 0.5 * (values[name] - start[name])).abs().max() < 1e-6
    assert record["l2_start"] == pytest.approx(0.25 * sum(float((values[n] - start[n]).square().sum()) for n in values), rel=1e-5)

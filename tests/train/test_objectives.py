"""Objectives and LoRA against what they are by definition."""

from __future__ import annotations

import math

import pytest

from ftpipe.train.objective.base import Example
from tests.train.small import examples, resumed, small_run, steps

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


def toy(monkeypatch, logits, targets, sequence=None):
    """A run and a batch whose tokens have these logits [K, V] and targets [K]; one sequence unless told."""
    import torch
    from torch.nn.functional import cross_entropy

    from ftpipe.train.run import Batch, Run

    monkeypatch.setattr("ftpipe.train.forward.token_losses", lambda model, batch: cross_entropy(logits, targets, reduction="none"))
    sequence = torch.zeros_like(targets) if sequence is None else sequence
    positions = torch.cat([torch.arange(int((sequence == s).sum())) for s in range(int(sequence.max()) + 1)])
    batch = Batch(torch.zeros(1, len(targets), dtype=torch.int64), positions[None], torch.arange(len(targets)), targets, sequence, float(len(targets)), ["r"])
    run = Run(model=None, load_base=None, identity={}, load_tokenizer=None)
    run.engine = type("Looks", (), {"look": staticmethod(lambda batch, function: function(run, batch).detach())})()
    return run, batch


def random_tokens(k=60, vocabulary=30, seed=0, spread=4.0):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(k, vocabulary, generator=generator) * spread).requires_grad_(), torch.randint(vocabulary, (k,), generator=generator)


def sft_gradient(logits, targets):
    """Of each token's own cross-entropy at its logits: softmax - onehot."""
    from torch.nn.functional import one_hot

    return logits.detach().softmax(-1) - one_hot(targets, logits.shape[1])


def loss_and_gradient(objective, run, batch, logits):
    """The objective's loss of the toy batch, divided by its count, and the gradient at the logits."""
    import torch

    objective.before_step(run, [batch])
    loss = objective.loss(run, batch) / batch.count
    return float(loss.detach()), torch.autograd.grad(loss, logits)[0]


def test_dft_weighs_each_gradient_by_the_tokens_probability(monkeypatch):
    import torch

    from ftpipe.train.objective.dft import Dft

    logits, targets = random_tokens()
    run, batch = toy(monkeypatch, logits, targets)
    loss, gradient = loss_and_gradient(Dft(), run, batch, logits)
    p = logits.detach().softmax(-1).gather(1, targets[:, None])
    assert p.min() < 1e-5 and p.max() > 0.5
    torch.testing.assert_close(gradient, p * sft_gradient(logits, targets) / 60, rtol=0, atol=1e-6 / 60)
    # The same in the words of TRL: the label's probability is taken from the logits and detached, ignored labels count for nothing.
    logp = logits.detach().double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert loss == pytest.approx(float((-logp.exp() * logp).sum() / 60), abs=1e-6)
    assert run.sums["cross_entropy"] == pytest.approx(float(-logp.sum()), rel=1e-5)


def test_dft_is_largest_where_the_probability_is_one_over_e(monkeypatch):
    import torch

    from ftpipe.train.objective.dft import Dft

    values = []
    grid = [i / 1000 for i in range(1, 1000)] + [1e-30, 1 - 1e-7, 1 / math.e]
    for p in grid:
        logits = torch.tensor([[math.log(p), math.log1p(-p)]], requires_grad=True)
        run, batch = toy(monkeypatch, logits, torch.tensor([0]))
        values.append(float(Dft().loss(run, batch).detach()))
    assert min(values) >= 0 and max(values) == pytest.approx(1 / math.e, abs=1e-6)
    assert grid[values.index(max(values))] == pytest.approx(1 / math.e, abs=2e-3)
    assert values[grid.index(1e-30)] < 1e-20 and values[grid.index(1 - 1e-7)] < 1e-6


def by_hand(model, rows, weigh):
    """Loss and norm of the gradient of LoRA of `weigh(losses of each row)` over the count, row by row with whole logits and plain torch."""
    import torch
    from torch.nn.functional import cross_entropy

    run = small_run(model)
    every = []
    for row in rows:
        ids, mask = torch.tensor([row.input_ids[0]]), torch.tensor(row.trained[0])
        every.append(cross_entropy(run.model(input_ids=ids, use_cache=False).logits[0, :-1][mask[1:]], ids[0, 1:][mask[1:]], reduction="none"))
    loss = weigh(every) / sum(map(len, every))
    gradients = torch.autograd.grad(loss, list(run.trainable().values()))
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients)), every


@pytest.mark.parametrize(("name", "zero"), [("dft", 0), ("dft", 3), *(("talr", z) for z in range(4))])
def test_a_weighted_step_is_the_same_in_one_micro_batch_in_eight_and_by_hand(model, name, zero):
    """tau belongs to the step: micro-batches of one row have the tau of the whole, which an explicit loop finds too."""
    import statistics

    rows = examples(8)
    taus = []

    def weigh(every):
        taus.append(statistics.median([float(v.detach().mean()) for v in every]))
        return sum(((-v.detach() / taus[0]).exp().clamp_min(0.01) if name == "talr" else (-v.detach()).exp()).mul(v).sum() for v in every)

    loss, norm, every = by_hand(model, rows, weigh)
    one, many = (steps(small_run(model, objective=name, zero=z), rows, 2, **how) for z, how in ((0, {"batch_tokens": 10_000}), (zero, {"alone": True})))
    for found in (one[0], many[0]):
        assert found["loss"] == pytest.approx(loss, abs=1e-5) and found["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert found["cross_entropy"] == pytest.approx(sum(float(v.detach().sum()) for v in every) / sum(map(len, every)), abs=1e-5)
        assert name == "dft" or found["tau"] == pytest.approx(taus[0], abs=1e-5)
    assert many[1]["loss"] == pytest.approx(one[1]["loss"], abs=2e-5) and many[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-3)
    if name == "talr":
        assert max(abs(float(v.detach().mean()) - taus[0]) for v in every) > 1e-3, "rows differ, so that a tau of the micro-batch would have been another"


def test_talr_at_tau_one_is_dft_and_without_end_sft(monkeypatch):
    import torch
    from torch.nn.functional import cross_entropy

    from ftpipe.train.objective.dft import Dft
    from ftpipe.train.objective.talr import Talr

    logits, targets = random_tokens(spread=1.0)
    run, batch = toy(monkeypatch, logits, targets)
    one, dft = (loss_and_gradient(o, run, batch, logits) for o in (Talr(tau=1.0, floor=0.0), Dft()))
    assert one[0] == pytest.approx(dft[0], abs=1e-6)
    torch.testing.assert_close(one[1], dft[1], rtol=0, atol=1e-6)
    far = loss_and_gradient(Talr(tau=1e6), run, batch, logits)
    assert far[0] == pytest.approx(float(cross_entropy(logits, targets).detach()), rel=1e-5)
    torch.testing.assert_close(far[1], sft_gradient(logits, targets) / 60, rtol=0, atol=1e-6)


def test_talr_sends_no_gradient_through_weights_or_temperature_and_no_token_falls_below_the_floor(monkeypatch):
    import statistics

    import torch

    from ftpipe.train.objective.talr import Talr

    logits, targets = random_tokens(spread=1.0)
    with torch.no_grad():
        logits[0] = 0.0
        logits[0, targets[0]] = math.log(1e-9 * 29 / (1 - 1e-9))
    sequence = torch.tensor([0] * 7 + [1] * 13 + [2] * 40)
    run, batch = toy(monkeypatch, logits, targets, sequence)
    _, gradient = loss_and_gradient(Talr(floor=0.03), run, batch, logits)
    losses = -logits.detach().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert float(losses[0]) == pytest.approx(-math.log(1e-9), rel=1e-5)
    tau = statistics.median(float(losses[sequence == s].mean()) for s in range(3))
    weights = [max(math.exp(-float(v) / tau), 0.03) for v in losses]
    assert weights[0] == 0.03 and 0.03 < max(weights) <= 1
    torch.testing.assert_close(gradient, torch.tensor(weights)[:, None] * sft_gradient(logits, targets) / 60, rtol=0, atol=1e-7)
    assert run.cache["talr"] == pytest.approx(tau, rel=1e-6)
    assert run.sums["weight"] == pytest.approx(sum(weights), rel=1e-5)


def test_talr_does_not_care_for_the_scale_of_the_losses(monkeypatch):
    """Two choices: the other logit 0 makes log p any number. Twice the loss of every token leaves every weight as it was."""
    import torch

    from ftpipe.train.objective.talr import Talr

    losses = torch.tensor([0.3, 2.0, 0.05, 1.0, 4.0])
    found = []
    for factor in (1.0, 2.0):
        p = (-factor * losses).exp()
        logits = torch.stack([p.log(), (1 - p).log()], 1).requires_grad_()
        run, batch = toy(monkeypatch, logits, torch.zeros(5, dtype=torch.int64))
        _, gradient = loss_and_gradient(Talr(), run, batch, logits)
        found.append(gradient[:, 0] / (p - 1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert found[0].max() / found[0].min() > 5


@pytest.mark.parametrize("name", ["dft", "talr"])
def test_a_weighted_objective_goes_on_after_a_kill_as_if_nothing_had_been(model, tmp_path, name):
    straight = small_run(model, objective=name)
    wanted = steps(straight, examples(), 5)
    run, found = resumed(tmp_path, model, examples(), 5, 3, objective=name)
    assert found == wanted[3:]
    assert all(run.engine.value(n).equal(straight.engine.value(n)) for n in run.engine.names)
    plain = [r["cross_entropy"] for r in wanted]
    assert plain[-1] < plain[0], "it learns"

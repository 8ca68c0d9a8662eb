"""Objectives that weigh or draw tokens, and one that leaves the prompts out, against their formulas."""

from __future__ import annotations

import math

import pytest

from tests.train.small import examples, resumed, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")


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


@pytest.mark.parametrize("name", ["dft", "talr", "one_token_rollout"])
def test_a_token_objective_goes_on_after_a_kill_as_if_nothing_had_been(model, tmp_path, name):
    straight = small_run(model, objective=name)
    wanted = steps(straight, examples(), 5)
    run, found = resumed(tmp_path, model, examples(), 5, 3, objective=name)
    assert found == wanted[3:]
    assert all(run.engine.value(n).equal(straight.engine.value(n)) for n in run.engine.names)
    plain = [r["cross_entropy"] for r in wanted]
    assert plain[-1] < plain[0], "it learns"


def rollout(monkeypatch, logits, targets, step=0, **settings):
    """The rollout's loss over the count, its gradient at the logits, what it drew, and the run."""
    import torch

    from ftpipe.train.objective.one_token_rollout import OneTokenRollout

    run, batch = toy(monkeypatch, logits, targets)
    run.step = step
    monkeypatch.setattr("ftpipe.train.forward.logits", lambda model, batch: logits)
    objective = OneTokenRollout(**settings)
    loss = objective.loss(run, batch) / len(targets)
    return float(loss.detach()), torch.autograd.grad(loss, logits)[0], objective.draw(run, batch, logits.detach()), run


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rollouts_are_drawn_from_the_model_as_it_is(monkeypatch, temperature):
    import torch

    logits, targets = random_tokens(k=4, vocabulary=12, spread=1.5)
    *_, drawn, _ = rollout(monkeypatch, logits, targets, samples=40_000, temperature=temperature)
    p = (logits.detach().double() / temperature).softmax(-1)
    found = torch.stack([row.bincount(minlength=12) for row in drawn]) / 40_000
    assert bool(((found - p).abs() < 4.5 * (p * (1 - p) / 40_000).sqrt() + 1e-9).all())
    assert not drawn[0].equal(rollout(monkeypatch, logits, targets, step=1, samples=40_000, temperature=temperature)[2][0])


def test_a_rollouts_gradient_is_the_rewards_times_those_of_the_log_probabilities(monkeypatch):
    """By hand: each draw pulls its own token by its reward. A reward of 1 goes to the data's token alone."""
    import torch
    from torch.nn.functional import one_hot

    logits, targets = random_tokens(k=20, vocabulary=10, spread=1.5)
    for penalty in (0.0, -0.3):
        loss, gradient, drawn, run = rollout(monkeypatch, logits, targets, samples=64, penalty=penalty)
        p = logits.detach().softmax(-1)
        expected, total, hits = torch.zeros_like(p), 0.0, 0
        for k in range(20):
            for token in drawn[k].tolist():
                reward = 1.0 if token == int(targets[k]) else penalty
                hits += token == int(targets[k])
                total -= reward * math.log(float(p[k, token])) / 64 / 20
                expected[k] -= reward * (one_hot(torch.tensor(token), 10) - p[k]) / 64 / 20
        assert loss == pytest.approx(total, abs=1e-5)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
        assert run.sums["hits"] == pytest.approx(hits / 64, rel=1e-5) and hits > 20


def test_a_rollout_without_a_hit_and_without_a_penalty_moves_nothing(monkeypatch):
    import torch

    logits = torch.zeros(3, 8)
    logits[:, 0] = -60.0
    *_, gradient, drawn, _ = rollout(monkeypatch, logits.requires_grad_(), torch.zeros(3, dtype=torch.int64), penalty=0.0)
    assert not bool((drawn == 0).any()) and not bool(gradient.any())


def test_many_rollouts_without_a_penalty_are_dft(monkeypatch):
    from ftpipe.train.objective.dft import Dft

    logits, targets = random_tokens(k=30, vocabulary=10, spread=1.5)
    _, gradient, _, _ = rollout(monkeypatch, logits, targets, samples=200_000, penalty=0.0)
    run, batch = toy(monkeypatch, logits, targets)
    _, dft = loss_and_gradient(Dft(), run, batch, logits)
    assert float((gradient - dft).norm() / dft.norm()) < 0.01


def test_rollouts_teach_the_datas_tokens(model):
    found = steps(small_run(model, objective="one_token_rollout", adapt="full"), examples(8), 30, rows_per_step=8, rate=3e-3)
    assert found[-1]["cross_entropy"] < found[0]["cross_entropy"] - 0.05 and found[-1]["hits"] > found[0]["hits"]


def conversations(n, first=0):
    return [{"row_id": f"r{i}", "format": "messages", "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": f"How many {'abcdefgh'[i % 8]}?"},
        {"role": "assistant", "content": "abcdefgh"[i % 8] * (3 + i % 5)}, {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": f"Still {i % 10}."}]} for i in range(first, first + n)]


def test_response_tuning_sees_answers_behind_bare_headers_and_nothing_else(tiny_model):
    from transformers import AutoTokenizer

    from ftpipe.data.render import Renderer
    from ftpipe.errors import DataError
    from ftpipe.train.objective.response_tuning import ResponseTuning

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [*conversations(3), {"row_id": "bad", "format": "messages", "messages": [{"role": "user", "content": "Hm?"}]}]
    *found, bad = ResponseTuning().encode(rows, Renderer(tokenizer))
    assert isinstance(bad, DataError)
    for row, example in zip(rows, found, strict=False):
        ids, trained = example.input_ids[0], example.trained[0]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert tokenizer.decode(ids) == "".join(f"<|im_start|>assistant\n{a}<|im_end|>" for a in answers)
        learnt = tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t])
        assert learnt.replace("\n", "") == "".join(f"{a}<|im_end|>" for a in answers)
        assert not any(m["content"] in tokenizer.decode(ids) for m in row["messages"] if m["role"] != "assistant")


def test_answers_learnt_alone_are_likelier_behind_instructions_too(tiny_model):
    """Held-out conversations: the loss of their answers, given the instructions that no training row had, is lower than the base model's."""
    import torch
    from transformers import AutoTokenizer

    from ftpipe.data.render import Renderer
    from ftpipe.train.batches import lay_out
    from ftpipe.train.forward import token_losses
    from ftpipe.train.objective.response_tuning import ResponseTuning
    from ftpipe.train.objective.sft import Sft

    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_model))
    run = small_run(tiny_model, objective="response_tuning", adapt="full")
    heldout = list(Sft().encode(conversations(8, first=100), renderer))
    batch = lay_out(heldout, 1.0)

    def loss():
        run.model.eval()
        with torch.no_grad():
            return float(token_losses(run.model, batch).mean())

    before = loss()
    run.model.train()
    steps(run, list(ResponseTuning().encode(conversations(24), renderer)), 12, rate=3e-3, batch_tokens=400)
    assert loss() < before - 0.5


def test_response_tuning_refuses_a_template_without_a_header(tiny_model):
    from transformers import AutoTokenizer

    from ftpipe.data.render import Renderer
    from ftpipe.errors import ConfigError
    from ftpipe.train.objective.response_tuning import ResponseTuning

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not add to the conversation"):
        list(ResponseTuning().encode(conversations(1), Renderer(tokenizer)))

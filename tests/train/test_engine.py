"""The step, under every ZeRO stage: the same mathematics whatever way it is computed. One rank here; `test_ranks.py` has two."""

from __future__ import annotations

import math

import pytest

from ftpipe.errors import TrainingError
from ftpipe.train.adapt.lora import Lora
from ftpipe.train.objective.sft import Sft
from ftpipe.train.run import Change
from tests.train.small import examples, small_run, steps
from tests.train.sparse import whole

pytestmark = pytest.mark.usefixtures("alone")
EXACT, ROUNDING = 1e-6, 2e-5
"""Losses of the same step: computed in the same order; in another."""


def losses(records):
    return [r["loss"] for r in records]


@pytest.fixture(scope="module")
def reference(model):
    """Losses and gradient norms by plain torch: no DeepSpeed, no packing, no micro-batches."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from ftpipe.train.batches import Plan
    from ftpipe.train.run import Run, derive_seed

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    torch.manual_seed(derive_seed(1, "start"))
    lora = Lora(r=4).prepare(base, Run(model=None, load_base=None, identity={}, load_tokenizer=None))
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    rows, found = examples(), []
    for _, numbers in Plan([e.tokens for e in rows], [1] * len(rows), 1, 100, rows_per_step=8).steps(steps=4):
        total, count = 0.0, 0
        for row in (rows[n] for n in numbers):
            ids, mask = torch.tensor([row.input_ids[0]]), torch.tensor(row.trained[0])
            logits = lora(input_ids=ids, use_cache=False).logits[0, :-1]
            total = total + cross_entropy(logits[mask[1:]], ids[0, 1:][mask[1:]], reduction="sum")
            count += int(mask[1:].sum())
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(total.detach() / count), float(norm)))
    return found


@pytest.mark.parametrize("zero", range(4))
def test_every_stage_takes_the_steps_of_plain_torch(model, reference, zero):
    run = small_run(model, zero=zero)
    records = steps(run, examples(), 4)
    assert losses(records) == pytest.approx([loss for loss, _ in reference], abs=ROUNDING)
    assert [r["grad_norm"] for r in records] == pytest.approx([norm for _, norm in reference], rel=1e-3)


@pytest.mark.parametrize("zero", [0, 2])
def test_eight_micro_batches_of_one_row_are_one_of_eight(model, zero):
    one = steps(small_run(model, zero=zero), examples(), 4, batch_tokens=10_000)
    eight = steps(small_run(model, zero=zero), examples(), 4, alone=True)
    assert losses(eight) == pytest.approx(losses(one), abs=ROUNDING)
    assert [r["grad_norm"] for r in eight] == pytest.approx([r["grad_norm"] for r in one], rel=1e-3)


def test_every_token_weighs_the_same_whichever_row_it_is_in(model):
    """A row of one trained token beside one of many: the step's loss is the mean over tokens, not over rows."""
    from ftpipe.train.objective.base import Example

    short, long = Example("a", ([5, 6, 7],), ([False, False, True],)), Example("b", ([9] * 40,), ([False] + [True] * 39,))
    alone = [steps(small_run(model), [row], 1)[0] for row in (short, long)]
    both = steps(small_run(model), [short, long], 1, alone=True)[0]
    assert both["loss"] == pytest.approx((alone[0]["loss"] + 39 * alone[1]["loss"]) / 40, abs=EXACT)


def test_bf16_trains_float32_masters(model):
    import torch

    run = small_run(model, dtype="bfloat16", zero=2)
    exact = losses(steps(small_run(model, zero=2), examples(), 3))
    assert losses(steps(run, examples(), 3)) == pytest.approx(exact, abs=0.02)
    assert {p.dtype for p in run.trainable().values()} == {torch.float32}
    assert {p.dtype for n, p in run.model.named_parameters() if "lora" not in n} == {torch.bfloat16}
    state = run.engine.optimizer_state()
    assert {v.dtype for s in state.values() for k, v in s.items() if k != "step"} == {torch.float32}
    # A master that moves by less than bf16 can hold is not lost: values are not all representable in bf16.
    value = run.engine.value(run.engine.names[0])
    assert not value.bfloat16().float().equal(value)


def test_a_higher_rate_of_one_group_reaches_the_optimizer(model):
    class TwoRates(Lora):
        """Trains B four times as fast as A (as LoRA+ does)."""

        def groups(self, model):
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            return [{"params": [p for n, p in named if "lora_A" in n]}, {"params": [p for n, p in named if "lora_B" in n], "lr_scale": 4.0}]

    moved = []
    for adapt in (Lora(r=4), TwoRates(r=4)):
        run = small_run(model, zero=2, adapt=adapt)
        start = {n: run.engine.value(n) for n in run.engine.names}
        steps(run, examples(), 1)
        moved.append({kind: max(float((run.engine.value(n) - start[n]).abs().max()) for n in start if kind in n) for kind in ("lora_A", "lora_B")})
    assert moved[1]["lora_B"] == pytest.approx(4 * moved[0]["lora_B"], rel=1e-3)
    assert moved[0]["lora_A"] == pytest.approx(moved[1]["lora_A"], abs=1e-9)


@pytest.mark.parametrize("zero", range(4))
def test_rebuilding_the_engine_changes_nothing_unless_told_to_forget(model, zero):
    class Rebuilt(Lora):
        forget: bool = False

        def before_step(self, run):
            return Change(forget=frozenset(run.engine.names if self.forget else ())) if run.step == 2 else None

    plain, rebuilt, forgetful = (steps(small_run(model, zero=zero, adapt=a), examples(), 4) for a in (Lora(r=4), Rebuilt(r=4), Rebuilt(r=4, forget=True)))
    assert losses(rebuilt) == losses(plain)
    assert losses(forgetful)[:3] == losses(plain)[:3]
    assert losses(forgetful)[3] != losses(plain)[3]


@pytest.mark.parametrize("zero", range(4))
def test_values_can_be_set(model, zero):
    import torch

    run = small_run(model, zero=zero)
    name = next(n for n in run.engine.names if "lora_B" in n)
    steps(run, examples(), 1)
    wanted = torch.full_like(run.engine.value(name), 0.25)
    run.engine.set_value(name, wanted)
    assert run.engine.value(name).equal(wanted)
    assert whole(run)[name].equal(wanted)
    run.engine.set_learning_rate(0.0)
    steps(run, examples(), 2, first=1, rate=0.0)
    assert run.engine.value(name).equal(wanted)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_loss_that_is_not_a_number_stops_with_the_rows(model, zero):
    class Broken(Sft):
        def loss(self, run, batch):
            return super().loss(run, batch) * (math.nan if run.step == 1 else 1.0)

    run = small_run(model, zero=zero, objective=Broken())
    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        steps(run, examples(), 3)
    assert "step 2" in caught.value.where and "r1" in caught.value.where


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_gradient_that_is_not_finite_stops_with_the_rows(model, zero):
    class Exploding(Lora):
        def on_gradients(self, run):
            name = run.engine.names[0]
            run.engine.set_gradient(name, run.engine.gradient(name) + math.inf)

    with pytest.raises(TrainingError, match="norm of the gradient") as caught:
        steps(small_run(model, zero=zero, adapt=Exploding(r=4)), examples(), 1)
    assert "step 1" in caught.value.where


def test_a_step_with_nothing_to_train_on_stops_with_the_rows(model):
    rows = [type(r)(r.row_id, r.input_ids, ([False] * r.tokens,)) for r in examples(4)]
    with pytest.raises(TrainingError, match="nothing to train on") as caught:
        steps(small_run(model), rows, 1)
    assert "r0" in caught.value.where


def test_memory_that_runs_out_names_what_to_lower(model):
    import torch

    class Greedy(Sft):
        def loss(self, run, batch):
            return super().loss(run, batch) + torch.zeros(2**50).sum()

    with pytest.raises(TrainingError, match="out of memory") as caught:
        steps(small_run(model, objective=Greedy()), examples(), 1)
    assert "batch_tokens" in caught.value.remedy


def test_dropout_is_the_same_for_a_row_whatever_came_before(model):
    """The random state belongs to the micro-batch, so a resume needs none."""
    adapt = {"lora": {"r": 4, "dropout": 0.3}}
    straight = steps(small_run(model, adapt=adapt), examples(), 3, rate=0.0)
    later = steps(small_run(model, adapt=adapt), examples(), 3, rate=0.0, first=2)
    assert straight[2]["grad_norm"] == later[0]["grad_norm"]
    assert straight[2]["grad_norm"] != steps(small_run(model, adapt=adapt, seed=2), examples(), 3, rate=0.0, first=2)[0]["grad_norm"]


def test_the_penalty_of_activations_is_a_mean_over_the_step(model):
    from ftpipe.train.regularizer.base import Regularizer

    class One(Regularizer):
        def penalty(self, run, batch):
            import torch

            return torch.ones(())

    for settings in ({"batch_tokens": 10_000}, {"alone": True}):
        run, plain = small_run(model), small_run(model)
        run.regularizers = (One(),)
        with_penalty, without = steps(run, examples(), 1, **settings), steps(plain, examples(), 1, **settings)
        assert with_penalty[0]["loss"] == pytest.approx(without[0]["loss"] + 1.0, abs=EXACT)


def test_losses_by_source_add_up_to_the_loss(model):
    import torch

    from ftpipe.train import forward
    from ftpipe.train.batches import lay_out

    run, rows = small_run(model), examples()
    alone = {}
    for i, row in enumerate(rows[:8]):
        with torch.no_grad():
            found = forward.token_losses(run.model, lay_out([row], 1.0))
        total, count = alone.get(i % 2, (0.0, 0))
        alone[i % 2] = (total + float(found.sum()), count + len(found))
    (record,) = steps(run, rows, 1, shuffle=False)
    for number, name in enumerate(("even", "odd")):
        total, count = alone[number]
        assert record[f"loss/{name}"] == pytest.approx(total / count, abs=ROUNDING)


def test_a_loss_that_climbs_stops_and_one_that_wavers_does_not():
    from ftpipe.errors import TrainingError
    from ftpipe.train.loop import Divergence

    def see(losses, factor=2.0):
        divergence = Divergence(factor)
        for i, loss in enumerate(losses):
            divergence.see({"loss": loss, "step": i + 1, "learning_rate": 0.1, "grad_norm": 1.0})

    falls = [5 - 0.05 * i for i in range(60)]
    for calm in (falls, [0.01, 0.02] * 20, [*falls, 9.0, *falls[-10:]], [3.0] * 8):
        see(calm)
    with pytest.raises(TrainingError, match=r"was 2\.\d+ before") as error:
        see([*falls, *[9.0] * 8])
    assert "learning_rate" in error.value.remedy and "step 6" in error.value.where
    see([*falls, *[9.0] * 8], factor=0.0)

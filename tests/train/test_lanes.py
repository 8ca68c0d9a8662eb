"""Micro-batches side by side: the same training, the same bytes, and only where nothing can get in the way of it."""

from __future__ import annotations

import random
import threading
import time

import pytest

from ftpipe.errors import TrainingError
from ftpipe.train.batches import Plan
from ftpipe.train.objective.sft import Sft
from tests.train.small import examples, resumed, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")
SMALL = {"batch_tokens": 50, "rows_per_step": 8}


@pytest.mark.parametrize("zero", range(3))
@pytest.mark.parametrize("objective", ["sft", "dft"])
def test_the_steps_are_those_of_one_micro_batch_after_the_other(model, zero, objective):
    found = []
    for threads in (0, 2):
        run = small_run(model, zero=zero, objective=objective, threads=threads)
        assert bool(run.lanes) == bool(threads)
        found.append(steps(run, examples(), 4, **SMALL))
    one, two = found
    for name in one[0].keys() - {"step", "epoch", "rows"}:
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-3, abs=2e-5), name


class Waits(Sft):
    """Takes a random time."""

    side_by_side = True

    def loss(self, run, batch):
        time.sleep(random.SystemRandom().random() * 0.02)
        return super().loss(run, batch)


def test_the_bytes_do_not_depend_on_who_is_done_first(model):
    import torch

    states = []
    for _ in range(3):
        run = small_run(model, threads=2)
        run.objective = Waits()
        steps(run, examples(), 3, **SMALL)
        states.append(run.engine.state())
    for other in states[1:]:
        assert all(torch.equal(states[0][n], other[n]) for n in states[0])


def test_two_are_computed_at_the_same_time(model):
    both = threading.Barrier(2)

    class Meets(Sft):
        side_by_side = True

        def loss(self, run, batch):
            both.wait(timeout=30)  # raises if no other comes
            return super().loss(run, batch)

    run = small_run(model, threads=2)
    run.objective = Meets()
    steps(run, examples(2), 1, batch_tokens=1, rows_per_step=2)


@pytest.mark.parametrize("more", [{"threads": 1}, {"zero": 3}, {"regularizers": ["neftune"]}, {"adapt": {"lora": {"r": 4, "dropout": 0.1}}},
                                  {"adapt": {"bitfit": {"missing": "add"}}}, {"adapt": "full"}, {"adapt": {"lora": {"r": 4, "dora": True}}},
                                  {"adapt": "layer_norm"}, {"adapt": "ia3"}, {"optimizer": "mezo", "adapt": "full"}])
def test_one_after_the_other_where_more_is_not_safe(model, more):
    assert small_run(model, **{"threads": 2} | more).lanes is None


def test_who_overrides_the_loss_has_to_say_so_anew(model):
    from ftpipe.train import lanes

    class Draws(Sft):
        def loss(self, run, batch):
            raise NotImplementedError

    run = small_run(model, threads=2)
    run.objective = Draws()
    assert lanes.make(run, 2) is None


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(model, tmp_path):
    import torch

    unbroken = small_run(model, threads=2)
    records = steps(unbroken, examples(), 4)
    run, after = resumed(tmp_path, model, examples(), 4, 2, threads=2)
    assert run.lanes and [r["loss"] for r in after] == [r["loss"] for r in records[2:]]
    state = unbroken.engine.state()
    assert all(torch.equal(state[n], v) for n, v in run.engine.state().items())


def test_somebody_who_listens_to_the_model_hears_one_micro_batch_at_a_time(model):
    from ftpipe.train import lanes

    run = small_run(model, threads=2)
    assert lanes.make(run, 2)
    handle = run.model.get_input_embeddings().register_forward_hook(lambda *args: None)
    assert lanes.make(run, 2) is None
    handle.remove()
    assert lanes.make(run, 2)


def test_a_row_without_a_finite_loss_is_named_and_nothing_goes_on(model):
    import torch

    running = []

    class Breaks(Waits):
        side_by_side = True

        def loss(self, run, batch):
            running.append(1)
            found = super().loss(run, batch)
            if "r3" in batch.row_ids:
                batch.losses = torch.full_like(batch.losses, float("nan"))
                return found * float("nan")
            return found

    run = small_run(model, threads=2)
    run.objective = Breaks()
    with pytest.raises(TrainingError, match="loss is nan") as caught:
        steps(run, examples(24), 1, batch_tokens=1, rows_per_step=24)
    assert "r3" in caught.value.where and "r4" not in caught.value.where
    begun = len(running)
    time.sleep(0.2)
    assert len(running) == begun


def test_each_lane_gets_as_many_tokens():
    draw = random.Random(0)
    lengths = [draw.randint(5, 400) for _ in range(200)]
    plan = Plan(lengths, [1] * 200, 0, 384, rows_per_step=16, lanes=2)
    apart = tokens = 0
    for rows in plan.epoch(0):
        packs = plan.packs(rows)
        assert sorted(r for p in packs for r in p) == sorted(rows)
        assert all(sum(lengths[r] for r in p) <= 384 or len(p) == 1 for p in packs)
        loads = [0, 0]
        for pack in packs:  # as two threads would take them
            loads[loads.index(min(loads))] += sum(lengths[r] for r in pack)
        apart, tokens = apart + abs(loads[0] - loads[1]), tokens + sum(loads)
    assert apart < 0.02 * tokens  # 0.041 without regard to lanes

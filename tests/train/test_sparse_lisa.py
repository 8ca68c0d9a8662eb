"""LISA: which layers train when, what the optimizer holds, and that a kill changes nothing."""

from __future__ import annotations

import gc
import math
from itertools import pairwise

import pytest

from ftpipe.errors import ConfigError
from ftpipe.train.adapt.lisa import Lisa
from ftpipe.train.engine import Engine
from tests.tiny import make_tiny_model
from tests.train.small import examples, small_run, steps
from tests.train.sparse import batches_of, gradients, loaded, moved, saved, stopped_and_resumed, whole

pytestmark = pytest.mark.usefixtures("alone")
SEED = 4
"""Draws (1, 2), (1, 3), (2, 3) of four layers: one stays, one leaves and comes back, one comes later."""
DECAY = {"adamw": {"weight_decay": 0.1, "eps": 1e-4}}
"""With an eps that keeps Adam from making full steps of rounding."""


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("four"), layers=4)


def layers_of(names) -> set[int]:
    return {int(n.split(".layers.")[1].split(".")[0]) for n in names if ".layers." in n}


def drawn(record) -> list[int]:
    return [int(record[f"lisa_layer_{i}"]) for i in (1, 2)]


@pytest.mark.parametrize(("zero", "dtype"), [(1, "float32"), (3, "bfloat16")])
def test_the_drawn_layers_move_and_no_others_and_the_shared_parts_always(four, tmp_path, zero, dtype):
    """With weight decay, which would move whatever the optimizer holds."""
    run = small_run(four, zero=zero, dtype=dtype, adapt={"lisa": {"active": 2, "every": 2}}, optimizer=DECAY, seed=SEED)
    start = before = whole(run)
    shared = {n for n in start if ".layers." not in n}
    assert shared == {"model.embed_tokens.weight", "model.norm.weight"}
    periods = []
    for step in range(6):
        record, = steps(run, examples(), step + 1, first=step)
        after = whole(run)
        changed = moved(before, after)
        assert changed == shared | {n for n in start if layers_of([n]) & set(drawn(record))}, "all of them, and nothing else"
        assert sorted(layers_of(changed)) == drawn(record) == run.adapt.drawn(4, run.seed, step // 2)
        periods.append(drawn(record))
        state = run.engine.optimizer_state()
        assert set(state) == changed, "state of what trains only"
        held = sum(v.numel() * v.element_size() for s in state.values() for k, v in s.items() if k != "step")
        assert held == 2 * 4 * sum(after[n].numel() for n in changed)
        before = after
    assert periods[0::2] == periods[1::2], "constant within a period"
    assert len({tuple(p) for p in periods}) > 1 and set(periods[2]) - set(periods[0]), "a layer is drawn for the first time after the start"
    touched = shared | {n for n in start if layers_of([n]) & {layer for p in periods for layer in p}}
    assert set(run.engine.state()) == touched == moved(start, after)
    fresh = dict(loaded(run, tmp_path / "saved").named_parameters())
    assert all(p.equal(after[n].to(p.dtype)) for n, p in fresh.items())


def test_every_layer_is_drawn_as_often_as_chance_has_it():
    layers, active, periods = 12, 3, 2000
    counts = [0] * layers
    for period in range(periods):
        found = Lisa(active=active).drawn(layers, 5, period)
        assert len(set(found)) == active and found == sorted(found)
        for layer in found:
            counts[layer] += 1
    q = active / layers
    assert all(abs(c - periods * q) <= 4 * math.sqrt(periods * q * (1 - q)) for c in counts)
    assert [Lisa(active=3).drawn(layers, 5, p) for p in range(9)] != [Lisa(active=3).drawn(layers, 6, p) for p in range(9)]


def plain_torch(run, n, forget_shared):
    """The same training with one torch optimizer for each layer, which is thrown away when the layer leaves."""
    import torch

    model = run.load_base().train()
    names = dict(model.named_parameters())
    groups = {-1: [p for m, p in names.items() if ".layers." not in m]}
    groups |= {i: [p for m, p in names.items() if f".layers.{i}." in m] for i in range(4)}
    held: dict[int, torch.optim.Optimizer] = {}
    for step, (batches, count) in enumerate(batches_of(run, n)):
        now = [-1, *run.adapt.drawn(4, run.seed, step // run.adapt.every)]
        if step % run.adapt.every == 0:
            held = {i: held[i] if i in held and not (i == -1 and forget_shared) else torch.optim.AdamW(groups[i], lr=1e-2, **DECAY["adamw"]) for i in now}
            for i, group in groups.items():
                for p in group:
                    p.requires_grad_(i in now)
                    p.grad = None
        for part in gradients(model, run, batches, count):
            for name, gradient in part.items():
                names[name].grad = gradient if names[name].grad is None else names[name].grad + gradient
        torch.nn.utils.clip_grad_norm_([p for p in names.values() if p.grad is not None], 1.0)
        for optimizer in held.values():
            optimizer.step()
            optimizer.zero_grad()
    return {n: p.detach() for n, p in names.items()}


@pytest.mark.parametrize(("zero", "forget"), [(0, False), (2, True), (3, False)])
def test_every_stage_takes_the_steps_of_plain_torch_with_an_optimizer_for_each_layer(four, zero, forget):
    """A layer that comes back starts from zero moments and a count of zero; one that stays keeps both."""
    import torch

    run = small_run(four, zero=zero, adapt={"lisa": {"every": 2, "forget_shared": forget}}, optimizer=DECAY, seed=SEED)
    steps(run, examples(), 6)
    sets = [set(run.adapt.drawn(4, run.seed, p)) for p in range(3)]
    assert any(a & b for a, b in pairwise(sets)), "one stays"
    assert any(a & c - b for a, b, c in zip(sets, sets[1:], sets[2:], strict=False)), "one leaves and comes back"
    wanted = plain_torch(run, 6, forget)
    for name, value in whole(run).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-5)
    other = plain_torch(run, 6, not forget)
    assert max(float((other[n] - wanted[n]).abs().max()) for n in wanted) > 2e-3, "the comparison tells the two apart"


@pytest.mark.parametrize(("zero", "stop"), [(0, 4), (2, 3), (3, 3)])
def test_a_kill_within_a_period_or_before_a_draw_changes_nothing(four, tmp_path, zero, stop):
    settings = {"zero": zero, "adapt": {"lisa": {"active": 2, "every": 2}}, "dtype": "bfloat16" if zero == 2 else "float32", "seed": SEED}
    straight = small_run(four, **settings)
    wanted = steps(straight, examples(), stop + 1)
    resumed, found = stopped_and_resumed(four, tmp_path / "checkpoints", stop, stop + 1, **settings)
    assert found == wanted[stop:]
    assert saved(resumed, tmp_path / "a") == saved(straight, tmp_path / "b")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_engine_of_an_earlier_period_may_be_collected_at_any_time(four, monkeypatch, zero):
    """DeepSpeed's engine lets go of its parameters when it is collected, and those that still train belong to the next one by then."""
    settings = {"zero": zero, "adapt": {"lisa": {"active": 2, "every": 2}}, "seed": SEED}

    def trained():
        run = small_run(four, **settings)
        records = steps(run, examples(), 5)
        return records, whole(run), run.engine.optimizer_state()

    build = Engine.build
    gc.disable()
    try:
        kept = trained()
        monkeypatch.setattr(Engine, "build", lambda self: (build(self), gc.collect()))
        collected = trained()
    finally:
        gc.enable()
    assert kept[0] == collected[0]
    assert all(value.equal(collected[1][name]) for name, value in kept[1].items())
    assert {n: set(s) for n, s in kept[2].items()} == {n: set(s) for n, s in collected[2].items()} and all(kept[2].values())


def test_more_layers_than_there_are_is_refused(four):
    with pytest.raises(ConfigError, match="the model has 4") as caught:
        small_run(four, adapt={"lisa": {"active": 5}})
    assert "4 or less" in caught.value.remedy

"""Starts that look at the rows, in real ranks: the same on all of them, and computed once however often a run is killed."""

from __future__ import annotations

import pytest

from tests.e2e.test_train_resume import COMMON, kill_at
from tests.train import planted

pytestmark = pytest.mark.e2e


def test_two_ranks_under_stage_three_start_as_one_does(tiny_model, tmp_path):
    import torch

    one, two = (planted.train(tmp_path / str(ranks), tiny_model, adapt={"eva": {"r": 4, "rows": 12}}, ranks=ranks, zero=zero, epochs=1, heartbeat=300)
                for ranks, zero in ((1, 2), (2, 3)))
    assert planted.losses(one) == pytest.approx(planted.losses(two), abs=1e-4)
    a, b = planted.tensors(one), planted.tensors(two)
    assert set(a) == set(b) and all(torch.allclose(a[n], b[n], rtol=1e-2, atol=1e-3) for n in a)


@pytest.mark.parametrize("adapt", [{"eva": {"r": 4, "rows": 12}}, {"corda": {"r": 4, "rows": 12}}])
def test_a_killed_run_reaches_the_same_bytes(tiny_model, tmp_path, adapt):
    settings = COMMON | {"adapt": adapt, "ranks": 1, "zero": 2, "heartbeat": 300}
    straight = planted.train(tmp_path / "straight", tiny_model, **settings)
    kill_at(tmp_path / "killed", tiny_model, settings, 4)
    told = planted.Told()
    resumed = planted.train(tmp_path / "killed", tiny_model, listener=told, **settings)
    assert told.steps[0]["step"] > 2, "it went on from a checkpoint"
    assert planted.payload(resumed) == planted.payload(straight)

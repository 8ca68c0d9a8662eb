"""A start that looks at the rows, in real ranks: the same on all of them, and computed once however often a run is killed."""

from __future__ import annotations

import pytest

from tests.e2e.test_train_resume import COMMON, kill_at
from tests.train import planted

pytestmark = pytest.mark.e2e


def test_two_ranks_under_stage_three_start_as_one_does_and_go_on_from_it_after_a_kill(tiny_model, tmp_path):
    import torch

    settings = COMMON | {"adapt": {"eva": {"r": 4, "rows": 12}}, "heartbeat": 300}
    one = planted.train(tmp_path / "one", tiny_model, **settings, ranks=1, zero=2)
    kill_at(tmp_path / "two", tiny_model, settings | {"ranks": 2, "zero": 3}, 4)
    told = planted.Told()
    two = planted.train(tmp_path / "two", tiny_model, listener=told, **settings, ranks=2, zero=3)
    assert told.steps[0]["step"] > 2, "it went on from a checkpoint"
    assert planted.losses(one) == pytest.approx(planted.losses(two), abs=1e-4)
    a, b = planted.tensors(one), planted.tensors(two)
    assert set(a) == set(b) and all(torch.allclose(a[n], b[n], rtol=1e-2, atol=1e-3) for n in a)

"""Packed rows: the same losses as alone, and a model that mixes them is found out."""

from __future__ import annotations

import pytest

from ftpipe.errors import TrainingError
from ftpipe.train import forward
from ftpipe.train.batches import lay_out
from tests.train.small import examples


@pytest.fixture(scope="module")
def loaded(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def packed_and_alone(n: int = 4):
    rows = examples(n)
    return lay_out(rows, 1.0), [lay_out([r], 1.0) for r in rows]


def test_packed_rows_get_the_loss_they_get_alone(loaded):
    batch, singles = packed_and_alone()
    assert forward.check_packing(loaded, batch, singles, "float32") < 1e-5


def test_rows_that_see_each_other_are_found_out(loaded):
    import torch

    class Leaking(torch.nn.Module):
        """What transformers does with an all-ones mask beside packed positions: one long sequence."""

        config = loaded.config

        def forward(self, input_ids, position_ids=None, attention_mask=None, **more):
            return loaded(input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids), **more)

    batch, singles = packed_and_alone()
    with pytest.raises(TrainingError, match="see each other"):
        forward.check_packing(Leaking(), batch, singles, "float32")


def test_positions_that_do_not_restart_are_found_out(loaded):
    import torch

    batch, singles = packed_and_alone(2)
    batch.position_ids = batch.position_ids + torch.where(batch.position_ids.cumsum(1) > 0, 40, 0)
    with pytest.raises(TrainingError, match="see each other"):
        forward.check_packing(loaded, batch, singles, "float32")


def test_logits_in_chunks_are_the_same_and_so_is_their_gradient(loaded, monkeypatch):
    import torch

    batch, _ = packed_and_alone(3)
    found = []
    for whole in (forward.WHOLE, 259 * 10):
        monkeypatch.setattr(forward, "WHOLE", whole)
        loaded.zero_grad()
        losses = forward.token_losses(loaded, batch)
        losses.sum().backward()
        found.append((losses.detach(), loaded.model.layers[0].mlp.up_proj.weight.grad.clone(), loaded.lm_head.weight.grad.clone()))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_without_targets_has_no_losses_but_a_gradient_path(loaded):
    rows = examples(1)
    batch = lay_out([type(rows[0])("r", rows[0].input_ids, ([False] * rows[0].tokens,))], 0.0)
    losses = forward.token_losses(loaded, batch)
    assert losses.shape == (0,)
    losses.sum().backward()

"""Quantised base models: what every method must hold, and int8's own bound."""

from __future__ import annotations

import pytest
import torch

from ftpipe import slots
from ftpipe.data.render import Renderer
from ftpipe.models.loading import load_model, load_tokenizer
from ftpipe.models.quantize.int8 import linear_class
from ftpipe.stages.base import Environment
from tests.models.data import some_rows

NAMES = slots.slots()["models/quantize"].names()


@pytest.fixture
def parts(tiny_model, tmp_path):
    env = Environment(tmp_path, tmp_path, "test")
    tokenizer = load_tokenizer(str(tiny_model), env)
    renderer = Renderer(tokenizer)
    return lambda: load_model(str(tiny_model), env, dtype="float32", device="cpu"), tokenizer, [renderer.row(r) for r in some_rows(6)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_smaller_states_its_loss_and_is_the_same_every_time(parts, name):
    load, tokenizer, probe = parts
    method = slots.parse("models/quantize", name)
    small, loss = method.apply(load(), tokenizer, probe)
    again, same = method.apply(load(), tokenizer, probe)
    assert loss == same and loss.layers == 14 and loss.bytes_after < loss.bytes_before
    assert loss.nll_before != loss.nll_after and loss.nll_after == pytest.approx(loss.nll_before, abs=0.05)
    tokens = torch.tensor([probe[0].input_ids])
    with torch.inference_mode():
        assert torch.equal(small(tokens).logits, again(tokens).logits)
    assert small.get_output_embeddings().weight.dtype == torch.float32, "the head keeps its type"


def test_int8_is_within_half_a_step_of_every_weight():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[4] *= 1e4
    small = linear_class()(linear)
    assert small.weight.dtype == torch.int8
    assert ((small.dequantized() - linear.weight).abs() <= small.scale[:, None] / 2 * 1.0001).all()
    assert torch.equal(small.weight.abs().amax(1)[torch.arange(32) != 3], torch.full((31,), 127, dtype=torch.int8))
    x = torch.randn(5, 64)
    torch.testing.assert_close(small(x), x @ small.dequantized().T + linear.bias, atol=1e-2, rtol=1e-4)
    weights = {n: p for n, p in small.named_parameters() if p.requires_grad}
    assert not weights

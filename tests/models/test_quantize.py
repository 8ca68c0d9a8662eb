"""Quantised base models: what every method must hold, and the bounds and closed forms of each."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch

from ftpipe import slots
from ftpipe.data.render import Renderer
from ftpipe.errors import ConfigError
from ftpipe.models.loading import load_model, load_tokenizer, quantized_on_disk
from ftpipe.models.quantize.int8 import linear_class
from ftpipe.models.quantize.nf4 import Nf4
from ftpipe.stages.base import Environment
from tests.models.data import some_rows
from tests.tiny import make_tiny_model

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (pip install 'ftpipe[gpu]')")
NAMES = [pytest.param(n, marks=needs_bitsandbytes) if n == "nf4" else n for n in slots.slots()["models/quantize"].names()]
IDS = torch.arange(5, 45)[None]


@pytest.fixture
def env(tmp_path):
    return Environment(tmp_path, tmp_path, "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """64 inputs a layer at least: a block of nf4."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden=64)


@pytest.fixture
def load(model, env):
    return lambda dtype="float32", quantize=None: load_model(str(model), env, dtype=dtype, device="cpu", quantize=quantize)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_it_is_smaller_states_its_loss_and_is_the_same_every_time(load, model, env, name):
    tokenizer = load_tokenizer(str(model), env)
    renderer = Renderer(tokenizer)
    probe = [renderer.row(r) for r in some_rows(6)]
    method = slots.parse("models/quantize", name)
    small, loss = method.apply(load(), tokenizer, probe)
    again, same = method.apply(load(), tokenizer, probe)
    assert loss == same and loss.layers == 14 and loss.bytes_after < loss.bytes_before
    assert loss.nll_before != loss.nll_after and loss.nll_after == pytest.approx(loss.nll_before, abs=0.05)
    assert torch.equal(logits(small), logits(again))
    assert small.get_output_embeddings().weight.dtype == torch.float32, "the head keeps its type"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_read_small_or_made_small_in_memory_it_is_the_same_model(load, name, dtype):
    method = slots.parse("models/quantize", name)
    read, made = load(dtype, method), method.quantize(load(dtype))
    assert read.quantized_by == method
    layers, others = method.small(read), method.small(made)
    assert list(layers) == list(others) and len(layers) == 14 and not list(method.layers(read))
    for key, layer in layers.items():
        assert layer.weight.data.equal(others[key].weight.data) and method.weight(layer).equal(method.weight(others[key]))
    assert torch.equal(logits(read), logits(made))


@pytest.mark.parametrize("name", NAMES)
def test_dequantized_it_is_a_plain_model_that_computes_the_same(load, name):
    method = slots.parse("models/quantize", name)
    whole = load()
    small = method.quantize(load())
    assert method.parameters(small) == sum(p.numel() for p in whole.parameters())
    before = logits(small)
    plain = method.dequantized(small, torch.float32)
    assert not method.small(plain) and {type(m) for n, m in plain.named_modules() if n.endswith("_proj")} == {torch.nn.Linear}
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(whole), before, rtol=1e-4, atol=1e-5), "and not what it was before"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_through_it_and_it_has_none(load, name):
    """Those of the input are the ones that the weight it stands for gives; evaluating it first changes neither the weight nor them."""
    method = slots.parse("models/quantize", name)
    model = method.quantize(load())
    for key, layer in method.small(model).items():
        before = {n: t.clone() for n, t in [*layer.named_parameters(), *layer.named_buffers()]}
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(len(key)), requires_grad=True)
        layer.eval()
        with torch.no_grad():
            still = layer(x)
        layer.train()
        out = layer(x)
        assert torch.equal(out, still), "evaluating and training see one base"
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        out.backward(up)
        weight = method.weight(layer).float()
        assert weight.shape == (layer.out_features, layer.in_features)
        torch.testing.assert_close(out, x @ weight.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x.grad, up @ weight, rtol=1e-4, atol=1e-5)
        assert all(t.equal(before[n]) for n, t in [*layer.named_parameters(), *layer.named_buffers()])
        assert not any(p.requires_grad or p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_pass_keeps_no_wide_weight(name):
    """What autograd saves for the backward pass of a layer is far smaller than its weight in floating point."""
    method = slots.parse("models/quantize", name)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256, bias=False))
    layer = method.quantize(model)[0]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True)).sum()
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= 64 * 256]


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


def one_layer(out: int = 128, inputs: int = 256, seed: int = 0) -> torch.nn.Sequential:
    model = torch.nn.Sequential(torch.nn.Linear(inputs, out, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)))
    return model


def round_trip(weight: torch.Tensor, **settings) -> torch.Tensor:
    method = Nf4(**settings)
    model = one_layer(*weight.shape)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return method.weight(method.quantize(model)[0])


@needs_bitsandbytes
@pytest.mark.parametrize("double", [False, True])
def test_nf4_takes_the_bytes_that_the_closed_form_says(double):
    out, inputs = 1024, 1024
    n = out * inputs
    method = Nf4(double=double)
    model = method.quantize(one_layer(out, inputs))
    layer = model[0]
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == n // 2, "two weights a byte"
    tables = 16 * 4  # the levels
    constants = 4 * n // 64
    if double:
        constants = n // 64 + 4 * n // (64 * 256) + 4  # 8 bits each, a scale for 256 of them, their mean
        tables += 256 * 4  # the levels of 8 bits
    assert method.bytes(model) == n // 2 + constants + tables
    assert method.bytes(model) / n == pytest.approx(0.5 + (0.01587 if double else 0.0625), abs=2e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("shape", [(128, 256), (16, 64), (48, 40)])
def test_nf4_is_the_nearest_level_times_the_largest_of_its_block(shape):
    """The levels from the paper's construction (quantiles of the normal distribution), the rounding by brute force."""
    tail = 1 - (1 / 30 + 1 / 32) / 2  # neither half may end at an infinite quantile; this is the library's choice
    upper, lower = (torch.special.ndtri(torch.linspace(tail, 0.5, n, dtype=torch.float64)[:-1]) for n in (9, 8))
    levels = torch.tensor(sorted([*(-lower).tolist(), 0.0, *upper.tolist()]), dtype=torch.float64)
    levels = levels / levels.abs().max()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = round_trip(weight, double=False).double().flatten()
    flat = weight.double().flatten()
    for start in range(0, flat.numel(), 64):
        block, mine = flat[start:start + 64], found[start:start + 64]
        absmax = block.abs().max()
        away = (block[:, None] / absmax - levels).abs()
        nearest = away.min(1).values
        assert ((mine - block).abs() / absmax <= nearest + 1e-4).all()
        assert ((mine[:, None] / absmax - levels).abs().min(1).values < 1e-5).all(), "only the 16 levels"


def int4(weight: torch.Tensor) -> torch.Tensor:
    """Plain integers -7 ... 7 with the same blocks."""
    blocks = weight.reshape(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / step).round() * step).reshape(weight.shape)


@needs_bitsandbytes
def test_nf4_loses_less_of_normal_weights_than_fp4_and_int4():
    for seed in range(3):
        weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(seed)) * 0.02
        error = {name: float((there - weight).pow(2).mean().sqrt() / weight.std()) for name, there in (
            ("nf4", round_trip(weight, double=False)), ("nf4 double", round_trip(weight)), ("fp4", round_trip(weight, levels="fp4", double=False)),
            ("int4", int4(weight)))}
        assert error["nf4"] < 0.95 * error["int4"] < error["fp4"], error
        assert error["nf4"] != error["nf4 double"] == pytest.approx(error["nf4"], rel=0.01), error


@needs_bitsandbytes
def test_a_layer_that_the_library_widens_wrongly_is_refused(monkeypatch):
    """Whatever the processor, a weight that is not its levels times its blocks' constants is noticed."""
    assert round_trip(torch.randn(8, 64)).shape == (8, 64)
    monkeypatch.setattr(Nf4, "weight", lambda self, layer: torch.zeros(layer.out_features, layer.in_features))
    with pytest.raises(ConfigError, match="4-bit layers of 64 inputs wrongly"):
        Nf4().quantize(one_layer(8, 64))


@needs_bitsandbytes
def test_the_type_it_computes_in_is_the_one_asked_for(load):
    layer = next(iter(Nf4(compute="bfloat16").small(load("float32", Nf4(compute="bfloat16"))).values()))
    x = torch.randn(2, layer.in_features)
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), (x.bfloat16() @ Nf4().weight(layer).T).float(), rtol=2e-2, atol=2e-3)
    assert Nf4().weight(layer).dtype == torch.bfloat16


def test_without_the_library_it_names_what_to_install(monkeypatch, tiny_model, env):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("ftpipe.models.quantize.nf4.find_spec", lambda name: None)
    for what in (lambda: Nf4().ready(), lambda: load_model(str(tiny_model), env, quantize=Nf4())):
        with pytest.raises(ConfigError, match="bitsandbytes, which is not installed") as caught:
            what()
        assert "ftpipe[gpu]" in caught.value.remedy


def test_a_model_that_is_stored_quantised_is_not_quantised_again(tiny_model, env, tmp_path):
    assert quantized_on_disk(str(tiny_model), env) is None
    there = tmp_path / "stored"
    shutil.copytree(tiny_model, there)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert quantized_on_disk(str(there), env) == "gptq"
    with pytest.raises(ConfigError, match="stored quantised already, by gptq"):
        load_model(str(there), env, quantize=slots.parse("models/quantize", "int8"))

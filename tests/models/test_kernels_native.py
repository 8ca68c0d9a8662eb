"""The compiled functions compute what torch's operations do, for any number of threads, and are done without where they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from ftpipe.models.kernels import attention_rows, cross_entropy, native, rms_norm, swiglu  # noqa: E402

LENGTHS, HEADS = (5, 9, 150, 300, 16, 1), (6, 2, 2)
TOKENS = sum(LENGTHS)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    if not native.load(request.param):
        pytest.skip("there is no C compiler")
    return request.param


def same(function, *tensors, exact=None, times=2):
    """Compiled and in torch's operations, each on copies: equal but for the rounding of a type, and used at all."""
    used, original = [], native.of
    native.of = lambda *given: used.append(original(*given)) or used[-1]
    try:
        own = function(*(t.clone() for t in tensors))
        assert used and all(used), "the compiled functions were not used"
        with native.aside():
            other = function(*(t.clone() for t in tensors))
    finally:
        native.of = original
    for a, b in zip(own, other, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        eps = torch.finfo(a.dtype if exact is None else exact).eps
        assert (a.double() - b.double()).norm() <= times * eps * b.double().norm(), function
    return own


def some(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)


def test_norms(dtype):
    x, more, grad = (some(37, 99, dtype=dtype, seed=s) for s in range(3))
    weight = 1 + some(99, dtype=dtype) / 10
    _, scale = same(lambda x: rms_norm.norm(x, weight, 1e-5), x)
    same(lambda x, more: (*rms_norm.norm(x, weight, 1e-5, more), x), x, more)
    same(lambda x: (rms_norm.scaled(x, weight, scale),), x)
    same(lambda g: (rms_norm.norm_backward(g, x, weight, scale), rms_norm.norm_backward(g, x, weight, scale, more)), grad)


def test_gates(dtype):
    gated, grad = some(37, 2 * 45, dtype=dtype) * 10, some(37, 45, dtype=dtype, seed=1)
    gated[0, :4] = torch.tensor([200.0, -200.0, 0.0, -80.0])  # far out of where e^x is a float
    gate, up = gated.float().clone().requires_grad_().split(45, 1)
    same(lambda g: (swiglu.gate(g),), gated)
    found, product = same(swiglu.gate_backward, gated, grad)
    wanted = torch.autograd.grad(torch.nn.functional.silu(gate) * up, (gate, up), grad.float())
    assert (found.float() - torch.cat(wanted, 1)).norm() <= torch.finfo(dtype).eps * torch.cat(wanted, 1).norm()
    assert torch.equal(product, swiglu.gate(gated))


def test_rows_of_heads_with_rotary_positions(dtype):
    angle = some(TOKENS, 4, dtype=torch.float32).repeat(1, 2)
    rotary = (angle.cos().to(dtype), angle.sin().to(dtype), 8)
    x = some(TOKENS, 10, 8, dtype=dtype)
    rows, = same(lambda x: (attention_rows.together(x, LENGTHS, HEADS, rotary),), x)
    same(lambda r: (attention_rows.apart(r, LENGTHS, HEADS, rotary),), rows)
    plain = attention_rows.together(x, LENGTHS, HEADS)
    assert torch.equal(attention_rows.apart(plain, LENGTHS, HEADS), x)
    with native.aside():
        assert torch.equal(attention_rows.together(x, LENGTHS, HEADS), plain)


def test_attention(dtype):
    q, k, v = (some(heads * TOKENS, 8, dtype=dtype, seed=heads + n) for n, heads in enumerate(HEADS))

    def both_ways(q, k, v):
        out, kept = attention_rows.attend(q, k, v, LENGTHS, 0.05, True)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        attention_rows.attend_backward(out, q, k, v, kept, LENGTHS, 0.05, grads)
        return out, *grads

    same(both_ways, q, k, v, times=4)


@pytest.mark.parametrize("wanted", [False, True])
def test_losses(dtype, wanted):
    logits, target = some(17, 5003, dtype=dtype), torch.arange(17) * 7
    logits[3] = float("-inf")
    logits[3, 5] = 1000.0
    target[3] = 5

    def losses(logits):
        loss = torch.empty(17)
        cross_entropy._softmax(logits, target, loss, wanted)
        return (loss, logits) if wanted else (loss,)

    loss, *_ = same(losses, logits, exact=torch.float32)
    assert loss[3] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(dtype, bad):
    """A loss that is not finite stops a run: it must not turn into a number on the way."""
    logits = some(2, 999, dtype=dtype)
    logits[1, 77] = bad
    loss = torch.empty(2)
    cross_entropy._softmax(logits, torch.tensor([1, 2]), loss, True)
    assert loss[0].isfinite() and not loss[1].isfinite() and logits[0].isfinite().all() and logits[1].isnan().any()
    x = some(2, 64, dtype=dtype)
    x[1, 5] = bad
    normed, scale = rms_norm.norm(x, torch.ones(64, dtype=dtype), 1e-5)
    assert normed[0].isfinite().all() and normed[1].isnan().any()
    grad = rms_norm.norm_backward(torch.ones_like(x), x, torch.ones(64, dtype=dtype), scale)
    assert grad[0].isfinite().all() and grad[1].isnan().any()
    assert not swiglu.gate(x)[1].isfinite().all() and swiglu.gate(x)[0].isfinite().all()
    scores = some(4, 4, dtype=dtype)
    scores[3, 1] = float("nan")
    native.of(scores).causal_softmax(scores, None, 4, 4, 4, 0)
    assert scores[:3].isfinite().all() and scores[3].isnan().all()


def test_values_are_the_same_for_any_number_of_threads(dtype):
    x, weight = some(501, 576, dtype=dtype), torch.ones(576, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(rms_norm.norm(x, weight, 1e-5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0]))


def test_types_and_layouts_it_is_not_made_for_are_left_to_torch(dtype):
    assert native.of(torch.ones(3, dtype=dtype)) and not native.of(torch.ones(3, dtype=torch.float64)) and not native.load(torch.float16)
    assert not native.of(torch.ones(3, 4, dtype=dtype).t()) and not native.of(torch.ones(3, dtype=dtype), torch.ones(3, dtype=torch.float64))
    assert not native.of(torch.ones(3, dtype=dtype, device="meta"))


compiler = pytest.mark.skipif(not native.load(torch.float32), reason="there is no C compiler")
TRY = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from ftpipe.models.kernels import native, rms_norm
print(native.load(torch.float32), len(rms_norm.norm(torch.ones(2, 3), torch.ones(3), 1e-5)))
"""


def begin(cache, **env):
    return subprocess.Popen([sys.executable, "-c", TRY], stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cache), **env})


def attempt(cache, **env):
    process = begin(cache, **env)
    said = process.communicate()[0]
    assert process.returncode == 0
    return said


def test_without_a_compiler_torch_computes_and_it_is_said(tmp_path):
    said = attempt(tmp_path, CC="there-is-none")
    assert "False 2" in said and "slower functions" in said and "there-is-none" in said
    assert not list((tmp_path / "ftpipe").iterdir())
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no space left on the planet' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "no space left on the planet" in attempt(tmp_path, CC=str(broken))
    assert not list((tmp_path / "ftpipe").iterdir())
    (tmp_path / "file").touch()
    assert "False 2" in attempt(tmp_path / "file")  # nowhere to keep it
    assert attempt(tmp_path, FTPIPE_NATIVE="0").strip() == "False 2"


@compiler
def test_it_is_compiled_once_and_a_damaged_library_is_made_anew(tmp_path):
    assert "True 2" in attempt(tmp_path)
    library, = (tmp_path / "ftpipe").iterdir()
    made = library.stat().st_mtime_ns
    assert "True 2" in attempt(tmp_path, PATH="/nowhere") and library.stat().st_mtime_ns == made
    whole = library.read_bytes()
    for damaged in (whole[:1000], b"", whole[:5000] + b"?" + whole[5001:]):  # the system's loader dies of the first
        library.write_bytes(damaged)
        assert "True 2" in attempt(tmp_path) and library.stat().st_size == len(whole)


@compiler
def test_two_processes_may_compile_it_at_once(tmp_path):
    both = [begin(tmp_path) for _ in range(2)]
    assert all("True 2" in p.communicate()[0] for p in both) and len(list((tmp_path / "ftpipe").iterdir())) == 1

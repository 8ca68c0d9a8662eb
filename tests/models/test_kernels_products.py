"""Compiled matrix products: linear layers with LoRA and causal attention, held against the same in float64, in torch's operations, and against themselves."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from ftpipe.models.kernels import attention, cross_entropy, lora, native  # noqa: E402

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not native.load(BF16) or not native.products(torch.ones(2, dtype=BF16)),
                                reason="no compiler, or a processor for which oneDNN's products are used (no AVX512-BF16, or AMX)")


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def miss(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def linear(n, size, outs, ranks):
    """x, W, bias, A, B, what is added, the gradient from above, and the blocks."""
    rank = sum(ranks)
    b, row, column = torch.zeros(sum(outs), rank), 0, 0
    for out, r in zip(outs, ranks):
        b[row:row + out, column:column + r] = some(out, r, seed=7)
        row, column = row + out, column + r
    a, b = (some(rank, size, seed=2) / size ** 0.5, b.to(BF16)) if rank else (None, None)
    return (some(n, size), some(sum(outs), size, seed=1) / size ** 0.5, some(sum(outs), seed=3), a, b, some(n, sum(outs), seed=4), some(n, sum(outs), seed=5),
            lora.Blocks(outs, ranks))


SIZES = [(37, 64, (64, 32, 32), (4, 4, 2)), (320, 576, (576, 192, 192), (8, 8, 8)), (5, 98, (130, 66), (16, 0)), (1, 2, (2,), (2,)), (33, 10, (40,), (0,)),
         (100, 9000, (50,), (6,)), (50, 2048, (80,), (2,)), (13, 64, (9000,), (0,))]
"""Tokens, inputs, outputs, ranks: whole tiles and parts of them, rows 4 KB apart, sums of more than two parts, layers without a LoRA."""


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_layers_and_what_comes_back(size):
    x, w, bias, a, b, more, grad, blocks = linear(*size)
    assert blocks.compiled(x, w, bias, a, b), "the compiled products were not used"
    out, low = lora.project(x, w, bias, a, b, blocks, more=more)
    dx, da, db = lora.project_backward(grad, x, low, w, a, b, True, blocks)
    wide = [None if t is None else t.double().requires_grad_() for t in (x, a, b)]
    truth = wide[0] @ w.double().t() + bias.double() + more.double()
    if a is not None:
        truth = truth + wide[0] @ wide[1].t() @ wide[2].t()
    wanted = torch.autograd.grad(truth, [t for t in wide if t is not None], grad.double())
    assert miss(out, truth.detach()) < 0.004 and miss(dx, wanted[0]) < 0.006
    if a is not None:
        inside = b != 0
        assert da.dtype == db.dtype == torch.float32
        assert miss(da, wanted[1]) < 0.006 and miss(db[inside], wanted[2][inside]) < 0.006
    only = lora.project_backward(grad, x, low, w, a, b, False, blocks)
    assert only[0] is None and (only[1] is da is None or torch.equal(only[1], da))


def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_number_of_threads():
    """To the bit, so that a micro-batch of eight rows is eight micro-batches of one."""
    x, w, bias, a, b, more, grad, blocks = linear(77, 576, (160, 34), (8, 4))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out, low = lora.project(x, w, bias, a, b, blocks, more=more)
            found.append((out, low, *lora.project_backward(grad, x, low, w, a, b, True, blocks)[:2]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for one in found[1:] for p, q in zip(one, found[0], strict=True))
    for part in (slice(0, 1), slice(5, 30), slice(70, 77)):
        out, low = lora.project(x[part], w, bias, a, b, blocks, more=more[part])
        assert torch.equal(out, found[0][0][part]) and torch.equal(lora.input_backward(grad[part], w, a, b, blocks=blocks)[0], found[0][2][part])


def test_what_is_not_finite_stays_in_its_row():
    x, w, bias, a, b, more, _, blocks = linear(40, 64, (64,), (4,))
    x[7, 3], x[8, 5] = float("nan"), float("inf")
    out, _ = lora.project(x, w, bias, a, b, blocks, more=more)
    bad = ~out.isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == [7, 8]


@pytest.mark.parametrize("size", [(5, 7, (4,), (2,)), (5, 6, (5,), (2,)), (5, 6, (4,), (3,))], ids=["inputs", "outputs", "rank"])
def test_odd_sizes_are_left_to_torch(size):
    x, w, bias, a, b, more, grad, blocks = linear(*size)
    assert not blocks.compiled(x, w, bias, a, b)
    out, low = lora.project(x, w, bias, a, b, blocks, more=more.clone())
    assert miss(out, x.double() @ w.double().t() + bias.double() + (x.double() @ a.double().t()) @ b.double().t() + more.double()) < 0.01
    assert lora.project_backward(grad, x, low, w, a, b, True, blocks)[1].shape == a.shape


def heads_of(lengths, heads, d, seed=0):
    angle = some(sum(lengths), d // 2, seed=9).float().repeat(1, 2)
    return some(sum(lengths), sum(heads), d, seed=seed), (angle.cos().to(BF16), angle.sin().to(BF16), sum(heads[:2]))


def both_ways(joined, grad, lengths, heads, rotary):
    scale = joined.shape[-1] ** -0.5
    out, kept = attention.packed(joined.clone(), lengths, heads, rotary, scale, True)
    return out, attention.packed_backward(grad, kept, lengths, heads, rotary, scale), kept


def truth_of(joined, grad, lengths, heads, rotary):
    wide = joined.double().requires_grad_()
    q, k, v = wide.split(heads, 1)
    cos, sin = (t.double()[:, None] for t in rotary[:2])
    q, k = (x * cos + torch.cat([-x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]], -1) * sin for x in (q, k))
    outs = []
    k, v = (t.repeat_interleave(heads[0] // heads[1], 1) for t in (k, v))
    for q, k, v in zip(*(t.split(lengths) for t in (q, k, v))):  # noqa: B020
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        outs.append(torch.einsum("hqk,khd->qhd", (scores + torch.full(scores.shape[1:], float("-inf")).triu(1)).softmax(-1), v))
    out = torch.cat(outs).reshape(len(joined), -1)
    return out.detach(), torch.autograd.grad(out, wide, grad.double())[0].view(len(joined), -1)


@pytest.mark.parametrize(("lengths", "heads", "d"), [((5, 9, 150, 1, 16, 1), (6, 2, 2), 8), ((320,), (9, 3, 3), 64), ((28, 100, 7), (9, 3, 3), 64),
                                                     ((700,), (4, 1, 1), 32), ((193, 191, 192), (2, 2, 2), 36), ((40,), (2, 1, 1), 128)], ids=str)
def test_attention_is_nearer_to_the_truth_than_torchs(lengths, heads, d):
    joined, rotary = heads_of(lengths, heads, d)
    grad = some(sum(lengths), heads[0] * d, seed=5)
    wanted = truth_of(joined, grad, lengths, heads, rotary)
    out, back, kept = both_ways(joined, grad, lengths, heads, rotary)
    assert len(kept) == 2 and kept[1].shape == (sum(lengths), heads[0]), "the compiled attention was not used"
    with native.aside():
        other, other_back, _ = both_ways(joined, grad, lengths, heads, rotary)
    with pytest.MonkeyPatch.context() as patch:  # a processor for which only the rest is compiled
        patch.setattr(native.of(joined), "products", False)
        third, third_back, kept = both_ways(joined, grad, lengths, heads, rotary)
    assert kept[0].dim() == 2 and miss(third, wanted[0]) < 0.01 and miss(third_back, wanted[1]) < 0.01
    assert miss(out, wanted[0]) < 1.02 * miss(other, wanted[0]) < 0.01
    assert miss(back, wanted[1]) < 1.02 * miss(other_back, wanted[1]) < 0.01


def test_a_model_whose_layers_are_its_own_uses_it_as_well():
    """Queries, keys and values as transformers hands them over, in tensors of their own."""
    lengths, heads, d = (50, 213, 1), (6, 2, 2), 16
    joined, rotary = heads_of(lengths, heads, d)
    rotary = (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]), rotary[2])
    grad = some(sum(lengths), heads[0] * d, seed=5)
    out, back, _ = both_ways(joined, grad, lengths, heads, rotary)
    parts = [t.transpose(0, 1).detach().requires_grad_() for t in joined.split(heads, 1)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        own = attention.PackedAttention.apply(*parts, lengths, d ** -0.5)
    assert sum(kept) == joined.numel() + sum(lengths) * heads[0]  # no probabilities
    assert torch.equal(own.transpose(0, 1).reshape(len(joined), -1), out)
    found = torch.autograd.grad(own, parts, grad.view(len(joined), heads[0], d).transpose(0, 1))
    assert torch.equal(torch.cat([t.transpose(0, 1) for t in found], 1).reshape(len(joined), -1), back)


def test_a_sequence_does_not_depend_on_its_neighbours_nor_on_the_number_of_threads():
    lengths, heads, d = (50, 213, 1, 30), (6, 3, 3), 16
    joined, rotary = heads_of(lengths, heads, d)
    grad = some(sum(lengths), heads[0] * d, seed=5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(both_ways(joined, grad, lengths, heads, rotary)[:2])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for p, q in zip(*found))
    at = slice(50, 263)
    alone = both_ways(joined[at], grad[at], (213,), heads, (rotary[0][at], rotary[1][at], rotary[2]))
    assert torch.equal(alone[0], found[0][0][at]) and torch.equal(alone[1], found[0][1][at])
    spoilt = joined.clone()
    spoilt[60] = float("nan")
    out, back, _ = both_ways(spoilt, grad, lengths, heads, rotary)
    assert out[60:263].isnan().any() and back[50:263].isnan().any()
    for other in (slice(0, 50), slice(263, None)):
        assert torch.equal(out[other], found[0][0][other]) and torch.equal(back[other], found[0][1][other])


def test_loss_over_a_vocabulary():
    hidden, weight, targets = some(70, 48), some(9002, 48, seed=1) / 7, torch.arange(70) * 128
    found = []
    for context in (nullcontext, native.aside):
        h = hidden.clone().requires_grad_()
        with context():
            losses = cross_entropy.FrozenHeadLoss.apply(h, weight, None, targets)
        losses.sum().backward()
        found.append((losses.detach(), h.grad))
    wide = hidden.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(wide @ weight.double().t(), targets, reduction="none")
    truth.sum().backward()
    for losses, grad in found:
        assert miss(losses, truth.detach()) < 1e-3 and miss(grad, wide.grad) < 0.006


def test_too_little_memory_is_an_error():
    with pytest.raises(MemoryError, match="too little memory"):
        native._enough(0)
    compiled = native.products(some(2, 2))
    assert all(getattr(compiled, name).errcheck is native._enough for name in native._PRODUCTS)

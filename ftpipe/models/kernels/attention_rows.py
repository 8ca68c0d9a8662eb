"""Causal attention in torch's matrix products, for processors and types for which there are no compiled ones: each sequence by itself, or a few short ones
together.

Heads are rows [.., d] of one tensor, in an order in which every product is of neighbouring rows, so that it reaches the speed of any other product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ftpipe.models.kernels import native

BLOCK = 256
"""Queries of a longer sequence that are taken at once; keys after the last of them are left out."""
TOGETHER = 128
"""Short sequences that follow each other share one product, under a mask, while they have no more tokens than this together. It is as fast as one product for
each, and the shapes of a micro-batch's products stay few: torch remembers a number of them (`memory.SHAPES`) and is several times slower beyond it."""

Rotary = tuple[Tensor, Tensor, int]
"""cos and sin [T, d] of rotary positions, and in how many of a token's heads, the first ones, they are."""


def together(x: Tensor, lengths: tuple[int, ...], heads: tuple[int, ...], rotary: Rotary | None = None) -> Tensor:
    """[T, sum of heads, d] as rows [T * sum of heads, d]: first all rows of the first heads, then all of the second and so on; of each, one group of sequences
    after the other, in it one head after the other, in that its tokens. Heads are turned on the way; x may be used up."""
    size, order = x.shape[-1], _order(lengths, heads)
    cos, sin, turned = rotary or (None, None, 0)
    compiled = native.of(x, *(rotary or ())[:2])
    if compiled is None:
        if turned:
            x[:, :turned] = _turned(x[:, :turned], cos, sin)
        return x.reshape(-1, size).index_select(0, order[0])
    rows = x.new_empty(len(order[0]), size)
    compiled.gather(x, rows, order[0], cos, sin, len(rows), sum(heads), turned, size)
    return rows


def apart(rows: Tensor, lengths: tuple[int, ...], heads: tuple[int, ...], rotary: Rotary | None = None) -> Tensor:
    """What `together` made, as [T, sum of heads, d] again; with `rotary` the gradient of what it was given from that of its result."""
    size, order = rows.shape[-1], _order(lengths, heads)
    cos, sin, turned = rotary or (None, None, 0)
    compiled = native.of(rows, *(rotary or ())[:2])
    if compiled is None:
        x = rows.index_select(0, order[1]).view(-1, sum(heads), size)
        if turned:
            x[:, :turned] = _turned(x[:, :turned], cos, sin, back=True)
        return x
    x = rows.new_empty(len(rows) // sum(heads), sum(heads), size)
    compiled.gather_backward(rows, x, order[0], cos, sin, len(rows), sum(heads), turned, size)
    return x


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Rotary positions: x cos + (-second half, first half of x) sin, of x [T, heads, d]; with `back` the gradient of x from that of the result."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    found = x * cos
    first, second = (sin[..., half:], sin[..., :half]) if back else (sin[..., :half], sin[..., half:])
    found[..., :half].addcmul_(x[..., half:], first, value=1 if back else -1)
    found[..., half:].addcmul_(x[..., :half], second, value=-1 if back else 1)
    return found


@lru_cache(maxsize=16)
def _order(lengths: tuple[int, ...], heads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    every = torch.arange(sum(lengths) * sum(heads)).view(-1, sum(heads))
    order = torch.cat([every[at:at + sum(group), first:first + count].t().flatten() for first, count in zip(accumulate(heads, initial=0), heads)
                       for at, group in _groups(lengths)])
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def parted(rows: Tensor, lengths: tuple[int, ...], heads: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Rows of queries, keys and values."""
    return rows.split([h * sum(lengths) for h in heads])


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Attention of rows as `together` gives them, q [heads * T, d], k and v [key heads * T, d]: rows like q, and what the backward pass is to be given.

    Products are in the type of the inputs, softmax is computed in float32 and its result rounded to that type. Probabilities are kept, if `keep`,
    of sequences no longer than `BLOCK`, and computed again for longer ones, so memory grows with the tokens and not their square.
    """
    out, kept = torch.empty_like(q), []
    for group, qs, outs, ks, vs in _each(lengths, (q, out), (k, v)):
        length = sum(group)
        for a, b in _blocks(length):
            p = _probabilities(_block(qs, a, b), ks[:, :b], a, scale, group)
            _write(outs, a, b, lambda to, p=p, vs=vs[:, :b]: torch.bmm(p, vs, out=to))
            if keep and length <= BLOCK:
                kept.append(p)
    return out, kept


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], lengths: tuple[int, ...], scale: float,
                    into: Sequence[Tensor]) -> None:
    """Write the gradients of q, k and v into `into`, from that of what `attend` returned; all of them are rows."""
    dq, dk, dv = into
    known = iter(kept)
    for group, qs, gs, dqs, ks, vs, dks, dvs in _each(lengths, (q, grad, dq), (k, v, dk, dv)):
        length = sum(group)
        several = length > BLOCK
        sums = [torch.zeros(t.shape, dtype=torch.float32) for t in (dks, dvs)] if several else []
        for a, b in _blocks(length):
            qb, gb = _block(qs, a, b), _block(gs, a, b)
            p = _probabilities(qb, ks[:, :b], a, scale, group) if several else next(known)
            ds = _softmax_backward(torch.bmm(gb, vs[:, :b].transpose(1, 2)), p)
            _write(dqs, a, b, lambda to, ds=ds, ks=ks[:, :b]: _product(ds, ks, scale, out=to))
            if several:
                sums[0][:, :b] += _product(ds.transpose(1, 2), qb, scale)
                sums[1][:, :b] += torch.bmm(p.transpose(1, 2), gb)
            else:
                _product(ds.transpose(1, 2), qb, scale, out=dks)
                torch.bmm(p.transpose(1, 2), gb, out=dvs)
        if several:
            dks.copy_(sums[0])
            dvs.copy_(sums[1])


def _each(lengths: tuple[int, ...], queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    """For each group of sequences their lengths and their part of all these rows: queries [key heads, g, length, d], keys [key heads, length, d]."""
    tokens, size = sum(lengths), queries[0].shape[-1]
    heads, key_heads = len(queries[0]) // tokens, len(keys[0]) // tokens
    for at, group in _groups(lengths):
        end = at + sum(group)
        yield (group, *(t[at * heads:end * heads].view(key_heads, heads // key_heads, end - at, size) for t in queries),
               *(t[at * key_heads:end * key_heads].view(key_heads, end - at, size) for t in keys))


@lru_cache(maxsize=16)
def _groups(lengths: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Sequences whose products are one: where each group begins, and the lengths in it."""
    groups: list[tuple[int, tuple[int, ...]]] = []
    at = 0
    for length in lengths:
        if groups and sum(groups[-1][1]) + length <= TOGETHER:
            groups[-1] = groups[-1][0], (*groups[-1][1], length)
        else:
            groups.append((at, (length,)))
        at += length
    return groups


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for a in range(0, length, BLOCK):
        yield a, min(a + BLOCK, length)


def _block(x: Tensor, a: int, b: int) -> Tensor:
    """Queries a to b of [h, g, n, d], those of one key head under each other: [h, g * (b - a), d]; a view if they are all."""
    return x[:, :, a:b].reshape(len(x), -1, x.shape[-1])


def _write(x: Tensor, a: int, b: int, compute: Callable[[Tensor], Any]) -> None:
    """Let `compute` write a tensor like `_block(x, a, b)`, which then stands there."""
    block = _block(x, a, b)
    compute(block)
    if b - a < x.shape[2]:
        x[:, :, a:b] = block.view(len(x), -1, b - a, x.shape[-1])


def _probabilities(q: Tensor, k: Tensor, first: int, scale: float, group: tuple[int, ...]) -> Tensor:
    """Causal probabilities of grouped queries [h, g * n, d], whose first is number `first` of its group, over keys [h, m, d]: [h, g * n, m]."""
    n, m = k.shape[1] - first, k.shape[1]
    scores = _product(q, k.transpose(1, 2), scale)
    compiled = native.of(scores)
    if compiled is not None:
        compiled.causal_softmax(scores, _starts(group) if len(group) > 1 else None, scores.numel() // m, m, n, first)
        return scores
    scores = scores.view(-1, n, m)
    scores[..., first:].add_(_hidden(n, scores.dtype) if len(group) == 1 else _hidden_of(group, scores.dtype))
    return torch.softmax(scores, -1).view(q.shape[0], -1, m)


def _softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient of scores from that of their probabilities p, which is used up."""
    compiled = native.of(grad, p)
    if compiled is None:
        return torch._softmax_backward_data(grad, p, -1, p.dtype)
    compiled.causal_softmax_backward(grad, p, p.numel() // p.shape[-1], p.shape[-1])
    return grad


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * a b by batch, rounded once."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=out)


@lru_cache(maxsize=4)
def _mask(dtype: torch.dtype) -> Tensor:
    return torch.full((BLOCK, BLOCK), float("-inf"), dtype=dtype).triu_(1)


def _hidden(n: int, dtype: torch.dtype) -> Tensor:
    """-inf where the key comes after the query, 0 elsewhere: [n, n]."""
    return _mask(dtype)[:n, :n]


@lru_cache(maxsize=16)
def _hidden_of(group: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same, where the key is of another sequence too."""
    starts = _starts(group)
    return _hidden(len(starts), dtype).masked_fill(starts[:, None] != starts, float("-inf"))


@lru_cache(maxsize=16)
def _starts(group: tuple[int, ...]) -> Tensor:
    """Where the sequence of each token of a group begins."""
    lengths = torch.tensor(group)
    return torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)

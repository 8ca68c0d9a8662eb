"""Causal attention over packed sequences on a CPU: each sequence by itself, in matrix products.

Torch's fused attention spends 9 ms forward and 22 ms backward on 512 tokens of 9 heads of 64 (bf16, one core of an AMD EPYC), as much as all linear layers of
that block together, and works through the whole square of a packed batch. Products of one sequence at a time reach the speed of any other product
and leave out what the mask would hide.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

NAME = "ftpipe_packed"
BLOCK = 256
"""Queries that are taken at once; keys after the last of them are left out."""


def install(model: Any) -> int:
    """Let a transformers model on a CPU use this attention where it used torch's; 1 if it does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if next(model.parameters()).device.type != "cpu" or getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return 0
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return 1


def forward(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
            scaling: float | None = None, position_ids: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention as transformers' models call it: query [1, heads, T, d], key and value [1, key heads, T, d]; returns [1, T, heads, d].

    Sequences are found where `position_ids` start again at 0. What this cannot do (a batch of several, a cache, a window shorter than a sequence, dropout,
    other devices) is left to torch's attention with the mask, so that the result is the same everywhere.
    """
    lengths = _lengths(module, query, key, value, dropout, position_ids, kwargs)
    if lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, position_ids=position_ids, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled("cpu"):  # as torch's attention does; the backward pass, to which autocast does not reach, finds one type
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        return PackedAttention.apply(query[0], key[0], value[0], lengths, scale).transpose(0, 1)[None], None


def _lengths(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, position_ids: Tensor | None,
             kwargs: dict[str, Any]) -> list[int] | None:
    """Tokens of each sequence, None where packed attention does not apply."""
    tokens = query.shape[2]
    if (query.device.type != "cpu" or position_ids is None or query.shape[0] != 1 or key.shape[2] != tokens or position_ids.shape != (1, tokens) or dropout
            or value.shape[-1] != query.shape[-1] or not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False
            or any(kwargs.get(k) is not None for k in ("softcap", "s_aux", "position_bias"))):
        return None
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        return None
    lengths = [b - a for a, b in zip(starts, [*starts[1:], tokens], strict=True)]
    window = kwargs.get("sliding_window")
    return None if window is not None and max(lengths) > window else lengths


class PackedAttention(torch.autograd.Function):
    """softmax(scale q k^T + causal mask) v for each sequence alone. q [heads, T, d]; k, v [key heads, T, d], heads a
    multiple of key heads; returns [heads, T, d].

    Products are in the type of the inputs, softmax is computed in float32 and its result rounded to that type. Probabilities are kept for the backward pass
    for blocks that are not larger than one sequence of `BLOCK`, and computed again for longer sequences, so memory grows with the tokens and not their square.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        out = torch.empty((q.shape[1], q.shape[0], q.shape[2]), dtype=q.dtype).transpose(0, 1)
        kept = []
        for at, length in _sequences(lengths):
            ks, vs = k[:, at:at + length].contiguous(), v[:, at:at + length].contiguous()
            for a, b in _blocks(length):
                qs = _grouped(q[:, at + a:at + b], k.shape[0])
                p = _probabilities(qs, ks[:, :b], a, scale)
                out[:, at + a:at + b] = torch.bmm(p, vs[:, :b]).view(q.shape[0], b - a, -1)
                if length <= BLOCK:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        scale, heads = ctx.scale, k.shape[0]
        dq, dk, dv = (torch.empty((t.shape[1], t.shape[0], t.shape[2]), dtype=t.dtype).transpose(0, 1) for t in (q, k, v))
        known = iter(kept)
        for at, length in _sequences(ctx.lengths):
            ks, vs = k[:, at:at + length].contiguous(), v[:, at:at + length].contiguous()
            several = length > BLOCK
            dks, dvs = (torch.zeros(t.shape, dtype=torch.float32) if several else None for t in (ks, vs))
            for a, b in _blocks(length):
                qs, gs = _grouped(q[:, at + a:at + b], heads), _grouped(grad[:, at + a:at + b], heads)
                p = _probabilities(qs, ks[:, :b], a, scale) if several else next(known)
                dvb = torch.bmm(p.transpose(1, 2), gs)
                ds = torch._softmax_backward_data(torch.bmm(gs, vs[:, :b].transpose(1, 2)), p, -1, p.dtype)
                dq[:, at + a:at + b] = _product(ds, ks[:, :b], scale).view(q.shape[0], b - a, -1)
                dkb = _product(ds.transpose(1, 2), qs, scale)
                if several:
                    dks[:, :b] += dkb
                    dvs[:, :b] += dvb
                else:
                    dks, dvs = dkb, dvb
            dk[:, at:at + length], dv[:, at:at + length] = dks, dvs
        return dq, dk, dv, None, None


def _sequences(lengths: list[int]):
    at = 0
    for length in lengths:
        yield at, length
        at += length


def _blocks(length: int):
    for a in range(0, length, BLOCK):
        yield a, min(a + BLOCK, length)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[heads * g, L, d] with the queries of one key head under each other: [heads, g * L, d]."""
    return x.reshape(heads, -1, x.shape[-1])


def _probabilities(q: Tensor, k: Tensor, first: int, scale: float) -> Tensor:
    """Causal probabilities of grouped queries [h, g * n, d], whose first is number `first` of its sequence, over keys [h, m, d]: [h, g * n, m]."""
    n, m = k.shape[1] - first, k.shape[1]
    scores = _product(q, k.transpose(1, 2), scale).view(-1, n, m)
    scores[..., first:].add_(_hidden(n, scores.dtype))
    return torch.softmax(scores, -1).view(q.shape[0], -1, m)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b by batch, rounded once."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


@lru_cache(maxsize=4)
def _mask(dtype: torch.dtype) -> Tensor:
    return torch.full((BLOCK, BLOCK), float("-inf"), dtype=dtype).triu_(1)


def _hidden(n: int, dtype: torch.dtype) -> Tensor:
    """-inf where the key comes after the query, 0 elsewhere: [n, n]."""
    return _mask(dtype)[:n, :n]

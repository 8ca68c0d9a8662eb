"""Causal attention over packed sequences on a CPU, each by itself.

Torch's fused attention spends 9 ms forward and 22 ms backward on 512 tokens of 9 heads of 64 (bf16, one core of an AMD EPYC), as much as all linear layers of
that block together, and works through the whole square of a packed batch. Here it is 3 and 6 ms in compiled code (`native_attention.c`), which leaves out
what the mask would hide and keeps one number a query and head for the backward pass. Where there is none it is products of rows (`attention_rows.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ftpipe.models.kernels import native
from ftpipe.models.kernels.attention_rows import Rotary, apart, attend, attend_backward, parted, together

NAME = "ftpipe_packed"


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


@contextmanager
def overheard() -> Iterator[dict[str, Any]]:
    """Yield what modules that use this attention hand to it by name meanwhile."""
    from transformers import AttentionInterface

    heard: dict[str, Any] = {}

    def listen(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        heard.update(kwargs)
        return forward(*args, **kwargs)

    AttentionInterface.register(NAME, listen)
    try:
        yield heard
    finally:
        AttentionInterface.register(NAME, forward)
        for name in ("position_ids", "dropout"):
            heard.pop(name, None)


def _lengths(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, position_ids: Tensor | None,
             kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Tokens of each sequence, None where packed attention does not apply."""
    tokens = query.shape[2]
    if query.device.type != "cpu" or query.shape[0] != 1 or key.shape[2] != tokens or dropout or value.shape[-1] != query.shape[-1]:
        return None
    return sequences(module, tokens, position_ids, kwargs)


def sequences(module: torch.nn.Module, tokens: int, position_ids: Tensor | None, kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Tokens of each of the sequences in `position_ids`; None if they do not say, or attention module `module`, called with `kwargs`, is of another kind."""
    if (position_ids is None or position_ids.shape != (1, tokens) or not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False
            or any(kwargs.get(k) is not None for k in ("softcap", "s_aux", "position_bias"))):
        return None
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        return None
    lengths = tuple(b - a for a, b in zip(starts, [*starts[1:], tokens], strict=True))
    window = kwargs.get("sliding_window")
    return None if window is not None and max(lengths) > window else lengths


class PackedAttention(torch.autograd.Function):
    """softmax(scale q k^T + causal mask) v for each sequence alone. q [heads, T, d]; k, v [key heads, T, d], heads a
    multiple of key heads; returns [heads, T, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        ctx.lengths, ctx.scale, ctx.heads = lengths, scale, (len(q), len(k), len(v))
        tokens = [t.transpose(0, 1).contiguous() for t in (q, k, v)]
        compiled = native.products(*tokens, even=q.shape[2:])
        ctx.compiled = compiled is not None
        if ctx.compiled:
            out, logs = _attend(compiled, tokens, lengths, scale)
            ctx.save_for_backward(*tokens, logs)
            return out.transpose(0, 1)
        rows = [together(t, lengths, t.shape[1:2]) for t in tokens]
        out, kept = attend(*rows, lengths, scale, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*rows, *kept)
        return apart(out, lengths, ctx.heads[:1]).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grads, grad = [torch.empty_like(t) for t in (q, k, v)], grad.transpose(0, 1).contiguous()
        if ctx.compiled:
            _attend_backward(native.products(grad), grad, (q, k, v), *kept, grads, ctx.lengths, ctx.scale)
        else:
            attend_backward(together(grad, ctx.lengths, ctx.heads[:1]), q, k, v, kept, ctx.lengths, ctx.scale, grads)
            grads = [apart(g, ctx.lengths, (heads,)) for g, heads in zip(grads, ctx.heads, strict=True)]
        return *(g.transpose(0, 1) for g in grads), None, None


def packed(joined: Tensor, lengths: tuple[int, ...], heads: tuple[int, int, int], rotary: Rotary, scale: float, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Attention of joined queries, keys and values [T, sum of heads, d], which are used up: [T, query heads * d], and what the backward pass is to be given."""
    cos, sin, turned = rotary
    compiled = native.products(joined, cos, sin, even=joined.shape[2:])
    if compiled is None:
        rows = together(joined, lengths, heads, rotary)
        out, kept = attend(*parted(rows, lengths, heads), lengths, scale, keep)
        return apart(out, lengths, heads[:1]).view(len(joined), -1), [rows, *kept]
    compiled.rotate(joined, cos, sin, len(joined), sum(heads), turned, joined.shape[2], False)
    out, logs = _attend(compiled, joined.split(heads, 1), lengths, scale)
    return out.view(len(joined), -1), [joined, logs]


def packed_backward(grad: Tensor, kept: Sequence[Tensor], lengths: tuple[int, ...], heads: tuple[int, int, int], rotary: Rotary, scale: float) -> Tensor:
    """The gradient of what `packed` was given, [T, sum of heads * d], from that of its result."""
    (rows, *kept), (cos, sin, turned), tokens = kept, rotary, len(grad)
    grad = grad.view(tokens, heads[0], -1)
    if rows.dim() == 2:
        d_rows = torch.empty_like(rows)
        attend_backward(together(grad, lengths, heads[:1]), *parted(rows, lengths, heads), kept, lengths, scale, parted(d_rows, lengths, heads))
        return apart(d_rows, lengths, heads, rotary).view(tokens, -1)
    compiled, found = native.products(rows), torch.empty_like(rows)
    _attend_backward(compiled, grad, rows.split(heads, 1), *kept, found.split(heads, 1), lengths, scale)
    compiled.rotate(found, cos, sin, tokens, sum(heads), turned, rows.shape[2], True)
    return found.view(tokens, -1)


def _attend(compiled: Any, parts: Sequence[Tensor], lengths: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Attention of queries, keys and values [T, heads, d], and the logarithm of each query's sum of exponentials [T, heads]."""
    q, k, _ = parts
    out, logs = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    compiled.attend(*_strided(*parts, out), logs, _bounds(lengths), len(lengths), q.shape[1], k.shape[1], q.shape[2], scale)
    return out, logs


def _attend_backward(compiled: Any, grad: Tensor, parts: Sequence[Tensor], logs: Tensor, into: Sequence[Tensor], lengths: tuple[int, ...],
                     scale: float) -> None:
    """Write the gradients of queries, keys and values into tensors that are laid out like them."""
    q, k, _ = parts
    compiled.attend_backward(*_strided(grad, *parts), logs, *into, _bounds(lengths), len(lengths), q.shape[1], k.shape[1], q.shape[2], scale)


def _strided(*of: Tensor) -> Iterator[Any]:
    """Each tensor [T, heads, d] with the distances between its tokens and between its heads."""
    return (each for t in of for each in (t, *t.stride()[:2]))


@lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])

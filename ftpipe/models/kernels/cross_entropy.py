"""Cross-entropy against a frozen output layer, without the logits.

The loss of a token and its gradient with respect to the hidden state are computed together, a few tokens at a time. Only the gradients, as large as the
hidden states, are kept: the logits of a vocabulary of 49,152 take 85 times that, and making them again for the backward pass costs half as much work again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftpipe.models.kernels import lora, native

PRODUCT, SOFTMAX = 2**24, 2**21
"""Logits that exist at once, in the type of the weights (32 MB as bfloat16: products of fewer tokens are slower by up to half), and those of which the
probabilities are computed at once, in float32 (8 MB, which stays in a cache)."""


class FrozenHeadLoss(torch.autograd.Function):
    """-log softmax(h W^T + bias)[target] of each token: h [K, d], W [V, d] and bias [V] frozen, targets [K]; float32 [K].

    The gradient of a token's loss is that of -log p times whatever comes from above, so any function of the K losses can be minimised.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        grads = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device) if wanted else None
        size, part = max(1, PRODUCT // weight.shape[0]), max(1, SOFTMAX // weight.shape[0])
        size = -(-len(targets) // max(1, -(-len(targets) // size)))  # as many products, of one size
        for at in range(0, len(targets), size or 1):
            logits, _ = lora.project(hidden[at:at + size].to(weight.dtype), weight, bias)
            for rows, target, loss in zip(logits.split(part), targets[at:at + size].split(part), losses[at:at + size].split(part), strict=True):
                _softmax(rows, target, loss, wanted)
            if wanted:
                lora.input_backward(logits, weight, out=grads[at:at + size])
        if wanted:
            ctx.save_for_backward(grads)
            ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return (grads * grad[:, None].to(grads.dtype)).to(ctx.dtype), None, None, None


def _softmax(logits: Tensor, target: Tensor, loss: Tensor, wanted: bool) -> None:
    """Write the loss of each row of logits [k, V] with target [k] into `loss` [k] and, if `wanted`, its gradient into `logits`."""
    compiled = native.of(logits)
    if compiled is not None:
        return compiled.token_losses(logits, target.contiguous(), loss, *logits.shape, wanted)
    target = target[:, None]
    wide = logits.to(torch.float32, copy=True)
    top = wide.amax(1, keepdim=True)
    at_target = wide.gather(1, target) - top
    total = wide.sub_(top).exp_().sum(1, keepdim=True)
    loss.copy_((total.log() - at_target).squeeze(1))
    if wanted:
        wide.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
        logits.copy_(wide)

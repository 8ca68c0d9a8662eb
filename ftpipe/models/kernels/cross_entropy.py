"""Cross-entropy against a frozen output layer, without the logits.

The loss of a token and its gradient with respect to the hidden state are computed together, a few tokens at a time. Only the gradients, as large as the
hidden states, are kept: the logits of a vocabulary of 49,152 take 85 times that, and making them again for the backward pass costs half as much work again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22
"""Logits that exist at once: 16 MB as float32, which stays in a cache."""


class FrozenHeadLoss(torch.autograd.Function):
    """-log softmax(h W^T + bias)[target] of each token: h [K, d], W [V, d] and bias [V] frozen, targets [K]; float32 [K].

    The gradient of a token's loss is that of -log p times whatever comes from above, so any function of the K losses can be minimised.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        grads = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device) if wanted else None
        size = max(1, CHUNK // weight.shape[0])
        for at in range(0, len(targets), size):
            span = slice(at, at + size)
            target = targets[span, None]
            logits = torch.nn.functional.linear(hidden[span].to(weight.dtype), weight, bias).float()
            top = logits.amax(1, keepdim=True)
            at_target = logits.gather(1, target) - top
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            losses[span] = (total.log() - at_target).squeeze(1)
            if wanted:
                p = logits.div_(total)
                p.scatter_add_(1, target, torch.full_like(total, -1.0))
                torch.mm(p.to(weight.dtype), weight, out=grads[span])
        if wanted:
            ctx.save_for_backward(grads)
            ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return (grads * grad[:, None].to(grads.dtype)).to(ctx.dtype), None, None, None

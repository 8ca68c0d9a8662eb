"""silu(gate) * up of a gated feed-forward layer, keeping only gate and up for the backward pass."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ftpipe.models.kernels import native


class SwiGlu(torch.autograd.Function):
    """silu(g) * u, elementwise. Autograd's own form keeps silu(g) as well and passes over the data twice more."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return nn.functional.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        dg = torch.ops.aten.silu_backward(grad * u, g)
        return dg, nn.functional.silu(g).mul_(grad)


def gate(gated: Tensor) -> Tensor:
    """silu(g) * u [n, h] of rows [g, u] of 2 h."""
    n, size = len(gated), gated.shape[1] // 2
    compiled = native.of(gated)
    if compiled is None:
        g, u = gated.split(size, 1)
        return nn.functional.silu(g).mul_(u)
    out = gated.new_empty(n, size)
    compiled.gate(gated, out, n, size)
    return out


def gate_backward(gated: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gated` from that of what `gate` made of it, which is used up, and what `gate` made of it again."""
    n, size = grad.shape
    found = torch.empty_like(gated)
    compiled = native.of(gated, grad)
    if compiled is not None:
        compiled.gate_backward(gated, grad, found, grad, n, size)
        return found, grad
    g, u = gated.split(size, 1)
    d_g, d_u = found.split(size, 1)
    active = nn.functional.silu(g)
    torch.mul(grad, active, out=d_u)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(u), g, grad_input=d_g)
    return found, active.mul_(u)


def install(model: nn.Module) -> int:
    """Use it in every feed-forward layer of the form down(silu(gate(x)) * up(x)); returns how many."""
    found = 0
    for module in model.modules():
        if all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")) and _is_it(module):
            module.forward = MethodType(_forward, module)
            found += 1
    return found


def _forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))


def _is_it(module: nn.Module) -> bool:
    """Whether the module computes exactly this, seen on a stand-in whose layers can be told from each other."""
    class Stand:
        def __init__(self) -> None:
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (lambda x: 2 * x - 1), (lambda x: x + 3), (lambda x: 5 * x), module.act_fn

    x = torch.linspace(-2, 2, 9)
    try:
        return bool(torch.equal(type(module).forward(Stand(), x), _forward(Stand(), x)))
    except Exception:  # the stand-in lacks something, so it is another layer
        return False

"""Root-mean-square norm with frozen weights, keeping its input and one number a token for the backward pass."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ftpipe.models.kernels import native


class RmsNorm(torch.autograd.Function):
    """w * (x / sqrt(mean(x^2) + eps)), the mean over the last axis and the quotient in float32 and rounded to x's type, as transformers has it.

    Autograd's own form keeps two float32 copies of the input and takes twice as many passes back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return norm_backward(grad, *ctx.saved_tensors), None, None


def norm(x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The normed x and, in float32, what each token was multiplied by: [..., 1]. `more` is added to x first, in place."""
    compiled = native.of(x, weight, *(() if more is None else (more,)))
    if compiled is None:
        return _norm(x if more is None else x.add_(more), weight, eps)
    out, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    compiled.norm(x, more, weight, eps, out, scale, scale.numel(), x.shape[-1])
    return out, scale


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.mul(scale).to(x.dtype), scale


def scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The normed x again, from what `norm` found."""
    compiled = native.of(x, weight)
    if compiled is None:
        return weight * x.float().mul(scale).to(x.dtype)
    out = torch.empty_like(x)
    compiled.scaled(x, weight, scale, out, scale.numel(), x.shape[-1])
    return out


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, more: Tensor | None = None) -> Tensor:
    """The gradient of x, and `more` added to it."""
    grad = grad.contiguous()
    compiled = native.of(grad, x, weight, *(() if more is None else (more,)))
    if compiled is not None:
        out = torch.empty_like(x)
        compiled.norm_backward(grad, x, weight, scale, more, out, scale.numel(), x.shape[-1])
        return out
    g = (grad * weight).float().mul_(scale)
    unit = x.float().mul(scale)
    found = g.sub_(unit.mul_((g * unit).mean(-1, keepdim=True))).to(x.dtype)
    return found if more is None else found.add_(more)


def install(model: nn.Module) -> int:
    """Use it in every norm layer that computes exactly this and whose weights are frozen; returns how many."""
    found = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and eps_of(module) is not None and _is_it(module):
            module.forward = MethodType(_forward, module)
            found += 1
    return found


def _forward(self: Any, x: Tensor) -> Tensor:
    if self.weight.requires_grad:
        return type(self).forward(self, x)
    return RmsNorm.apply(x, self.weight, eps_of(self))


def eps_of(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_it(module: Any) -> bool:
    """Whether the layer's own forward pass gives the same bits on a sample."""
    weight = getattr(module, "weight", None)
    if not torch.is_tensor(weight) or weight.dim() != 1 or not weight.numel() or weight.requires_grad:
        return False
    x = torch.linspace(-2, 3, 4 * weight.numel(), device=weight.device).view(4, -1).sin().to(weight.dtype)
    with torch.no_grad():
        return bool(torch.equal(module(x), _norm(x, weight, eps_of(module))[0]))

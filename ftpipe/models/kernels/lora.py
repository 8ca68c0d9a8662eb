"""LoRA on a linear layer as one differentiable function.

PEFT computes result + lora_B(lora_A(x)) * scaling with each part as an operation of its own: x is copied to float32 for the float32 adapter and back to
the type of autocast, and the output is passed over for the product, the scaling and the sum. Here the second product adds into the output of the first, in both
directions, and the only tensor kept for the backward pass that the frozen layer alone would not keep is x A^T.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T in the type of W; x [..., in], W [out, in], A [r, in], B [out, r]. W and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        a_, b_ = a.to(weight.dtype), b.to(weight.dtype)
        low = flat @ a_.t()
        out = nn.functional.linear(flat, weight, bias).addmm_(low, b_.t(), alpha=scaling)
        ctx.save_for_backward(flat, low, weight, a_, b_)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (x.dtype, a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        back = grad @ b * ctx.scaling
        dx = (grad @ weight).addmm_(back, a).view(ctx.shape).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        da = (back.t() @ x).to(ctx.dtypes[1]) if ctx.needs_input_grad[3] else None
        db = (grad.t() @ low).mul_(ctx.scaling).to(ctx.dtypes[2]) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None


def install(model: nn.Module) -> int:
    """Give PEFT's plain LoRA layers this forward pass; returns how many. What they cannot do falls back to PEFT's at each call."""
    import sys

    if "peft" not in sys.modules:
        return 0
    from peft.tuners.lora.layer import Linear

    layers = [m for m in model.modules() if type(m) is Linear and type(m.get_base_layer()) is nn.Linear and not m.lora_variant]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, names = self.base_layer, self.active_adapters
    if (args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A or self.lora_variant
            or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad) or not base.weight.is_floating_point()):
        return type(self).forward(self, x, *args, **kwargs)
    name = names[0]
    # A method may have put a module of its own, which computes something else, in the place of one of the two.
    if (type(self.lora_A[name]) is not nn.Linear or type(self.lora_B[name]) is not nn.Linear
            or (self.training and getattr(self.lora_dropout[name], "p", 0.0)) or self.lora_A[name].bias is not None or self.lora_B[name].bias is not None):
        return type(self).forward(self, x)
    with torch.autocast(x.device.type, enabled=False):
        return LoraLinear.apply(x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, float(self.scaling[name]))

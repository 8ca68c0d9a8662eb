"""LoRA on a linear layer as one differentiable function.

PEFT computes result + lora_B(lora_A(x)) * scaling with each part as an operation of its own: x is copied to float32 for the float32 adapter and back to
the type of autocast, and the output is passed over for the product, the scaling and the sum. Here the second product adds into the output of the first, in both
directions, and the only tensor kept for the backward pass that the frozen layer alone would not keep is x A^T.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftpipe.models.kernels import native


class LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T in the type of W; x [..., in], W [out, in], A [r, in], B [out, r]. W and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        a_, b_ = a.to(weight.dtype), (b * scaling).to(weight.dtype)
        out, low = project(flat, weight, bias, a_, b_)
        ctx.save_for_backward(flat, low, weight, a_, b_)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (x.dtype, a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        dx, da, db = project_backward(grad.reshape(-1, grad.shape[-1]), x, low, weight, a, b, ctx.needs_input_grad[0])
        return (None if dx is None else dx.view(ctx.shape).to(ctx.dtypes[0]), None, None,
                da.to(ctx.dtypes[1]) if ctx.needs_input_grad[3] else None, db.to(ctx.dtypes[2]) * ctx.scaling if ctx.needs_input_grad[4] else None, None)


class Blocks(NamedTuple):
    """Of which layers, side by side, a weight consists: of each how many outputs it has and of what rank its LoRA is, 0 without one.

    B [sum of outs, sum of ranks] is 0 but for a block of each layer.
    """

    outs: tuple[int, ...]
    ranks: tuple[int, ...]

    def compiled(self, x: Tensor, weight: Tensor, *others: Tensor | None) -> Any | None:
        """The compiled functions for these tensors, where there are some."""
        return native.products(x, weight, *others, even=(weight.shape[1], *self.outs, *self.ranks))

    def arguments(self) -> tuple[int, Tensor, Tensor]:
        return len(self.outs), _numbers(self.outs), _numbers(self.ranks)


@lru_cache(maxsize=64)
def _numbers(of: tuple[int, ...]) -> Tensor:
    return torch.tensor(of)


def one(weight: Tensor, a: Tensor | None) -> Blocks:
    """A weight of one layer."""
    return Blocks((len(weight),), (0 if a is None else len(a),))


def project(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None = None, b: Tensor | None = None, blocks: Blocks | None = None,
            more: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x W^T + bias + (x A^T) B^T + more, and x A^T; x [n, in], all of one type. Without A and B the plain layer, and None."""
    blocks = blocks or one(weight, a)
    compiled = blocks.compiled(x, weight, bias, a, b, more)
    if compiled is not None:
        out, low = x.new_empty(len(x), len(weight)), None if a is None else x.new_empty(len(x), len(a))
        compiled.project(x, weight, bias, a, b, more, low, out, *x.shape, *blocks.arguments())
        return out, low
    out, low = nn.functional.linear(x, weight, bias), None
    if a is not None:
        low = x @ a.t()
        out.addmm_(low, b.t())
    return out if more is None else out.add_(more), low


def project_backward(grad: Tensor, x: Tensor, low: Tensor | None, weight: Tensor, a: Tensor | None, b: Tensor | None,
                     wanted: bool = True, blocks: Blocks | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (if `wanted`), A and B of `project`, whose second result is `low`."""
    dx, back = input_backward(grad, weight, a, b, wanted, blocks)
    return dx, *pair_backward(grad, back, x, low, blocks)


def input_backward(grad: Tensor, weight: Tensor, a: Tensor | None = None, b: Tensor | None = None, wanted: bool = True,
                   blocks: Blocks | None = None, out: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x (if `wanted`; written to `out`, if that is given) and of x A^T."""
    blocks = blocks or one(weight, a)
    compiled = blocks.compiled(grad, weight, a, b)
    if compiled is not None:
        back = None if a is None else grad.new_empty(len(grad), len(a))
        dx = out if out is not None or not wanted else grad.new_empty(len(grad), weight.shape[1])
        compiled.input_backward(grad, weight, a, b, back, dx, len(grad), weight.shape[1], *blocks.arguments())
        return dx, back
    dx = torch.mm(grad, weight, out=out) if wanted else None
    if a is None:
        return dx, None
    back = grad @ b
    return dx if dx is None else dx.addmm_(back, a), back


def pair_backward(grad: Tensor, back: Tensor | None, x: Tensor, low: Tensor | None, blocks: Blocks | None = None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of A and B; `back` is that of `low`, x A^T. In float32 if compiled; of B only the blocks mean something."""
    if back is None:
        return None, None
    blocks = blocks or Blocks((grad.shape[1],), (low.shape[1],))
    compiled = blocks.compiled(grad, x, back, low)
    if compiled is None:
        return back.t() @ x, (low.t() @ grad).t()
    da, db = (grad.new_empty(low.shape[1], n, dtype=torch.float32) for n in (x.shape[1], grad.shape[1]))
    compiled.pair_backward(grad, back, x, low, da, db, *x.shape, *blocks.arguments())
    return da, db.t()


def install(model: nn.Module) -> int:
    """Give PEFT's plain LoRA layers this forward pass; returns how many. What they cannot do falls back to PEFT's at each call."""
    if "peft" not in sys.modules:
        return 0
    from peft.tuners.lora.layer import Linear

    layers = [m for m in model.modules() if type(m) is Linear and type(m.get_base_layer()) is nn.Linear and not m.lora_variant]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


class Adapted(NamedTuple):
    """A frozen linear layer and the LoRA at work on it, if there is one."""

    base: nn.Linear
    a: nn.Linear | None = None
    b: nn.Linear | None = None
    scaling: float = 1.0


def adapted(module: Any) -> Adapted | None:
    """What a layer that `install` took in hand computes now, or a plain linear layer; None if it is something else."""
    if type(module) is nn.Linear:
        return None if _trains(module) else Adapted(module)
    base, names = getattr(module, "base_layer", None), getattr(module, "active_adapters", ())
    if type(base) is not nn.Linear or getattr(vars(module).get("forward"), "__func__", None) is not _forward:
        return None
    if module.disable_adapters or module.merged or len(names) != 1 or names[0] not in module.lora_A or module.lora_variant or _trains(base):
        return None
    a, b = module.lora_A[names[0]], module.lora_B[names[0]]
    # A method may have put a module of its own, which computes something else, in the place of one of the two.
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None or b.bias is not None:
        return None
    if module.training and getattr(module.lora_dropout[names[0]], "p", 0.0):
        return None
    return Adapted(base, a, b, float(module.scaling[names[0]]))


def _trains(base: nn.Linear) -> bool:
    return base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad) or not base.weight.is_floating_point()


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = None if args or kwargs else adapted(self)
    if found is None:
        return type(self).forward(self, x, *args, **kwargs)
    with torch.autocast(x.device.type, enabled=False):
        return LoraLinear.apply(x, found.base.weight, found.base.bias, found.a.weight, found.b.weight, found.scaling)

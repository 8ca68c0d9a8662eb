"""Weights as 8-bit integers, one scale for each output of a layer."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.models.quantize.base import Quantizer, replace

if TYPE_CHECKING:
    import torch


@lru_cache
def linear_class() -> type[torch.nn.Linear]:
    """The layer: int8 weight (out, in), scale (out,), bias. Made on first use, because this module must not import torch when it is imported.

    It is a `torch.nn.Linear` by class, so that adapters find it, though its weight is a buffer: integers have no gradient and ZeRO leaves them whole.
    """
    import torch

    class Product(torch.autograd.Function):
        """x (weight * scale)^T. Keeps the integers for the backward pass and widens them again there: autograd's own would keep every wide weight."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(weight, scale)
            # integers up to 127 are exact in bfloat16, so the scale is applied to the product
            return torch.nn.functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            weight, scale = ctx.saved_tensors
            return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None

    class Int8Linear(torch.nn.Linear):
        def __init__(self, linear: torch.nn.Linear):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = linear.in_features, linear.out_features
            weight = linear.weight.detach().float()
            scale = (weight.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
            self.register_buffer("weight", (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
            self.register_buffer("scale", scale)
            self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

        def dequantized(self) -> torch.Tensor:
            """(out, in) float32 weight that this layer stands for; within scale / 2 of the one it was made from."""
            return self.weight.float() * self.scale[:, None]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            out = Product.apply(x, self.weight, self.scale)
            return out if self.bias is None else out + self.bias.to(out.dtype)

    return Int8Linear


class Int8(Quantizer):
    """Symmetric rounding to the nearest of 255 steps, per output channel: w is kept as round(w / s), s = max |w| / 127 over the channel's weights.

    Weights only, activations keep their type. It runs on a CPU as on a GPU, halves a bfloat16 model's linear layers in memory, and makes them no faster: the
    integers are widened at each use, in the backward pass too. No calibration data. Under ZeRO 3 the small layers stay whole on every rank.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)

    def quantize(self, model: Any) -> Any:
        for name, layer in list(self.layers(model)):
            replace(model, name, linear_class()(layer).to(layer.weight.device).train(layer.training))
        return model

    def is_small(self, module: torch.nn.Module) -> bool:
        return type(module) is linear_class()

    def weight(self, layer: Any) -> torch.Tensor:
        return layer.dequantized()

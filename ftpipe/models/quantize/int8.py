"""Weights as 8-bit integers, one scale for each output of a layer."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.models.quantize.base import Quantizer

if TYPE_CHECKING:
    import torch


@lru_cache
def linear_class() -> type[torch.nn.Module]:
    """The layer: int8 weight (out, in), scale (out,), bias. Made on first use, because this module must not import torch when it is imported."""
    import torch

    class Int8Linear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear):
            super().__init__()
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
            # integers up to 127 are exact in bfloat16, so the scale is applied to the product
            out = torch.nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
            return out if self.bias is None else out + self.bias

    return Int8Linear


class Int8(Quantizer):
    """Symmetric rounding to the nearest of 255 steps, per output channel: w is kept as round(w / s), s = max |w| / 127 over the channel's weights.

    Weights only, activations keep their type. It runs on a CPU as on a GPU, halves a bfloat16 model's linear layers in memory, and makes them no faster: the
    integers are widened at each use. No calibration data.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    def quantize(self, model: Any) -> Any:
        for name, layer in list(self.layers(model)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear_class()(layer).to(layer.weight.device))
        return model

"""Bottleneck adapters (Houlsby et al. 2019): two small networks in each layer, each on a sub-layer's output before the residual addition.

    h + W_up f(W_down h + b_down) + b_up,  h the output of the attention (after its projection) or of the feed-forward network

In a decoder that normalises first: x + A(Attn(norm(x))), then x + A(FFN(norm(x))). Trained are the networks and copies of all normalisation layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftpipe.train.adapt._inserted import Activation, InsertedAdapt, after, blocks, bottleneck, copy_norms, insert
from ftpipe.train.adapt.base import Adapt

if TYPE_CHECKING:
    import torch


class Bottleneck(InsertedAdapt):
    """Both weights start from a normal distribution cut off at two standard deviations, biases at zero: near the base model, and at it with `init: zero_up`.
    The released code has a standard deviation of 1e-3, the paper's text 1e-2; the change at the start grows with its square."""

    paper: ClassVar[str] = "Parameter-Efficient Transfer Learning for NLP"

    size: int = Field(default=64, ge=1, description="Width of the bottleneck; a layer gets 2 (2 d size + d + size) parameters, d being the model's width.")
    init: Literal["normal", "zero_up"] = Field(default="normal", description="How W_up starts: as W_down, or at zero (then the start is the base model).")
    std: float = Field(default=1e-3, gt=0, description="Standard deviation of the weights at the start.")
    activation: Activation = Field(default="gelu", description="Function between the two weights.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the bottleneck that is dropped during training.")
    norms: bool = Field(default=True, description="Train copies of all normalisation layers, as the paper does; they belong to the adapter.")

    def sized(self, size: int) -> Adapt:
        return self.with_fields(size=size)

    def install(self, model: torch.nn.Module, generator: torch.Generator | None) -> None:
        from torch.nn.init import trunc_normal_

        for block in blocks(model):
            for module in (block.attention, block.feed_forward):
                network = bottleneck(model, self.size, self.activation, dropout=self.dropout)
                if generator is not None:
                    for layer in (network.down, network.up)[: 1 if self.init == "zero_up" else 2]:
                        trunc_normal_(layer.weight, std=self.std, a=-2 * self.std, b=2 * self.std, generator=generator)
                insert(module, network, after)
        if self.norms:
            copy_norms(model)

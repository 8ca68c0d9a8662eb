"""Scaled parallel adapters (He et al. 2022): a bottleneck beside each feed-forward network, which reads what the network reads.

    FFN(u) + s (W_up relu(W_down u + b_down) + b_up),  u the feed-forward network's own input (in a decoder that normalises first: after the norm)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.train.adapt._inserted import Activation, InsertedAdapt, beside, blocks, bottleneck, insert
from ftpipe.train.adapt.base import Adapt

if TYPE_CHECKING:
    import torch


class Parallel(InsertedAdapt):
    """W_down starts uniform (Kaiming), W_up and the biases at zero, so that training starts at the base model exactly."""

    paper: ClassVar[str] = "Towards a Unified View of Parameter-Efficient Transfer Learning"

    size: int = Field(default=512, ge=1, description="Width of the bottleneck; a layer gets 2 d size + d + size parameters, d being the model's width.")
    scale: float = Field(default=4.0, ge=0, description="s, the factor of what is added.")
    activation: Activation = Field(default="relu", description="Function between the two weights.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the bottleneck that is dropped during training.")

    def sized(self, size: int) -> Adapt:
        return self.with_fields(size=size)

    def install(self, model: torch.nn.Module, generator: torch.Generator | None) -> None:
        from torch.nn.init import kaiming_uniform_

        for block in blocks(model):
            network = bottleneck(model, self.size, self.activation, self.scale, self.dropout)
            if generator is not None:
                kaiming_uniform_(network.down.weight, a=5**0.5, generator=generator)
            insert(block.feed_forward, network, beside)

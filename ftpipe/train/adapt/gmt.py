"""Gradient-Mask Tuning (Li et al. 2024): of each step's gradient only the largest entries are passed on to the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.train.adapt.full import Full
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch


class Gmt(Full):
    """Full fine-tuning where each tensor's gradient keeps its `keep_ratio` largest entries by absolute value, the rest set to zero.

    The gradient is that of the whole step: summed over all micro-batches and ranks, then masked once, then clipped. The mask is made anew at each step
    and not remembered. A tensor of n entries keeps max(1, floor(keep_ratio n)), and more where several are as large as the smallest kept one. The paper
    leaves open whether the threshold is one for each tensor or one for all; it is one for each here. Only the gradient is masked, as in the paper: an
    optimizer with momentum or weight decay goes on moving entries whose gradient is zero (SGD without either moves none). Parts that act on gradients
    after this one (a regularizer of parameters) are not masked.

    The adapter holds the entries that differ from the base model at the end. Each step records `gmt_kept`, the share of entries whose gradient is left.
    """

    paper: ClassVar[str] = "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._weights", "ftpipe.models.sparse", "ftpipe.train.adapt.full")

    keep_ratio: float = Field(default=0.2, gt=0, le=1, description="Share of each tensor's gradient that is kept; 1 is full fine-tuning.")

    def only_changed(self) -> bool:
        return True

    def kept(self, gradient: torch.Tensor) -> torch.Tensor:
        """Which entries of one tensor's gradient are kept: bool, of its shape."""
        size = gradient.abs()
        n = max(1, int(gradient.numel() * self.keep_ratio))
        return size >= size.flatten().topk(n, sorted=False).values.min()

    def on_gradients(self, run: Run) -> None:
        left = total = 0
        for name in run.engine.names:
            gradient = run.engine.gradient(name)
            keep = self.kept(gradient)
            if not bool(keep.all()):
                gradient *= keep
                run.engine.set_gradient(name, gradient)
            left, total = left + int(gradient.count_nonzero()), total + gradient.numel()
        run.metrics["gmt_kept"] = left / total

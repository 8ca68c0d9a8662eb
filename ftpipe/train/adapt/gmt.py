"""Gradient-Mask Tuning (Li et al. 2024): of each step's gradient only the largest entries are passed on to the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftpipe.train.adapt.full import Full
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch


class Gmt(Full):
    """Full fine-tuning where the gradient keeps its `keep_ratio` largest entries by absolute value, the rest set to zero.

    The gradient is that of the whole step: summed over all micro-batches and ranks, then masked once, then clipped. The mask is made anew at each step
    and not remembered. Of n entries max(1, floor(keep_ratio n)) are kept, and more where several are as large as the smallest kept one. The paper leaves
    open whether the threshold is one for each tensor or one for all (`scope`). Only the gradient is masked, as in the paper: an
    optimizer with momentum or weight decay goes on moving entries whose gradient is zero (SGD without either moves none). Parts that act on gradients
    after this one (a regularizer of parameters) are not masked.

    The adapter holds the entries that differ from the base model at the end. Each step records `gmt_kept`, the share of entries whose gradient is left.
    """

    paper: ClassVar[str] = "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._weights", "ftpipe.models.sparse", "ftpipe.train.adapt.full")

    keep_ratio: float = Field(default=0.2, gt=0, le=1, description="Share of the gradient's entries that is kept; 1 is full fine-tuning.")
    scope: Literal["tensor", "model"] = Field(default="tensor", description="What the share is of: each `tensor` has a threshold of its own, or one threshold "
                                              "serves the whole `model`, so that some tensors keep more than others and some nothing.")

    def only_changed(self) -> bool:
        return True

    def kept(self, gradient: torch.Tensor) -> torch.Tensor:
        """Which entries of one tensor's gradient are kept: bool, of its shape."""
        size = gradient.abs()
        n = max(1, int(gradient.numel() * self.keep_ratio))
        return size >= size.flatten().topk(n, sorted=False).values.min()

    def threshold(self, run: Run) -> torch.Tensor:
        """The n-th largest absolute value of all entries of all gradients, n as above: float32, exact, with one gradient in memory at a time.

        The bits of a float32 that is not negative, read as an integer, are in the order of the values; so two counts, of the upper and of the lower half of
        the bits, find it.
        """
        import torch

        def bits(name: str) -> torch.Tensor:
            return run.engine.gradient(name).abs().flatten().view(torch.int32)

        def reached(counts: torch.Tensor, n: int) -> tuple[int, int]:
            """The highest value such that n are at or above it, and how many of the n are left for that value itself."""
            above = counts.flip(0).cumsum(0)
            place = int((above < n).sum())
            return len(counts) - 1 - place, n - (int(above[place - 1]) if place else 0)

        counts = sum(torch.bincount(bits(name) >> 16, minlength=2**15) for name in run.engine.names)
        high, n = reached(counts, max(1, int(int(counts.sum()) * self.keep_ratio)))
        counts = sum(torch.bincount(b[b >> 16 == high] & 0xFFFF, minlength=2**16) for b in map(bits, run.engine.names))
        low, _ = reached(counts, n)
        return torch.tensor((high << 16) + low, dtype=torch.int32).view(torch.float32).to(counts.device)

    def on_gradients(self, run: Run) -> None:
        left = total = 0
        threshold = self.threshold(run) if self.scope == "model" else None
        for name in run.engine.names:
            gradient = run.engine.gradient(name)
            keep = self.kept(gradient) if threshold is None else gradient.abs() >= threshold
            if not bool(keep.all()):
                gradient *= keep
                run.engine.set_gradient(name, gradient)
            left, total = left + int(gradient.count_nonzero()), total + gradient.numel()
        run.metrics["gmt_kept"] = left / total

"""The k entries of largest magnitude over many tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HIGH, LOW = 1 << 16, 1 << 15
"""A float32 magnitude is 31 bits, and as a whole number in the same order: 16 bits found by one histogram, 15 by the next."""


@dataclass(frozen=True)
class Largest:
    """Which entries are kept: all whose magnitude is above `threshold`, and of those at it the first `at[name]` of each tensor, in its own order."""

    threshold: int
    at: dict[str, int]
    kept: int
    total: int

    def mask(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """True for the entries of this tensor that are kept, in its shape."""
        bits = magnitude(tensor)
        mask = bits > self.threshold
        if self.at.get(name):
            mask[(bits == self.threshold).nonzero()[: self.at[name], 0]] = True
        return mask.view(tensor.shape)


def magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """Float32 magnitudes as int32 in the same order, flat."""
    import torch

    return tensor.detach().float().abs().contiguous().view(torch.int32).flatten()


def largest(tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]], share: float) -> Largest:
    """The `int(share * n)` largest of n entries; among equal ones those that come first.

    tensors: gives every tensor with its name; it is asked three times.
    """
    import torch

    high = torch.zeros(HIGH, dtype=torch.int64)
    for _, tensor in tensors():
        high += torch.bincount(magnitude(tensor) >> 15, minlength=HIGH)
    total = int(high.sum())
    wanted = int(share * total)
    if wanted == 0:
        return Largest(2**31 - 1, {}, 0, total)
    bin_, left = _from_above(high, wanted)
    low = torch.zeros(LOW, dtype=torch.int64)
    for _, tensor in tensors():
        bits = magnitude(tensor)
        low += torch.bincount((bits[(bits >> 15) == bin_] & (LOW - 1)).long(), minlength=LOW)
    rest, left = _from_above(low, left)
    threshold = (bin_ << 15) | rest
    at: dict[str, int] = {}
    for name, tensor in tensors():
        at[name] = min(left, int((magnitude(tensor) == threshold).sum()))
        left -= at[name]
    return Largest(threshold, at, wanted, total)


def _from_above(histogram: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th largest entry, and how many of that bin are wanted."""
    above = histogram.flip(0).cumsum(0)
    place = int((above >= wanted).nonzero()[0, 0])
    return len(histogram) - 1 - place, wanted - (int(above[place - 1]) if place else 0)

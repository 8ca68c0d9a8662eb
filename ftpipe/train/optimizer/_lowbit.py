"""Numbers in few bits: groups of consecutive entries, each with a scale and a zero point of its own (asymmetric, as Q-GaLore stores its matrices).

For a group with least value a and largest b, both widened to hold 0, and n = 2^bits - 1:

    scale = max(b - a, 1e-5) / n;    zero = round(-a / scale);    code = clamp(round(w / scale) + zero, 0, n);    w' = (code - zero) scale

Without the widening, a group that lies wholly on one side of 0 would need a zero point outside 0..n and come back as something else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALLEST = 1e-5
"""Least width of a group's range."""


@dataclass(frozen=True)
class Packed:
    """A tensor in few bits. codes: uint8, for 4 bits two entries a byte; scale: float32, and zero: uint8, one a group."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def pack(value: torch.Tensor, bits: int, group: int, generator: torch.Generator | None = None) -> Packed:
    """`value` in 4 or 8 bits. With a generator w / scale is rounded up with the probability of its fractional part, else to the nearest."""
    flat = value.detach().float().flatten()
    size = flat.numel()
    rows = torch.nn.functional.pad(flat, (0, -size % group)).view(-1, group)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    largest = 2**bits - 1
    scale = (high - low).clamp(min=SMALLEST) / largest
    zero = (-low / scale).round().clamp(0, largest)
    units = rows / scale
    if generator is not None:
        units = (units + torch.rand(units.shape, generator=generator, device=units.device)).floor()
    codes = (units.round() + zero).clamp(0, largest).to(torch.uint8).flatten()[:size]
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, size % 2)).view(-1, 2)
        codes = codes[:, 0] | (codes[:, 1] << 4)
    return Packed(codes, scale.flatten(), zero.flatten().to(torch.uint8))


def unpack(packed: Packed, shape: tuple[int, ...], bits: int, group: int) -> torch.Tensor:
    """The float32 tensor of `shape` that `packed` stands for."""
    size = 1
    for length in shape:
        size *= length
    codes = packed.codes
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 1).flatten()[:size]
    rows = torch.nn.functional.pad(codes.float(), (0, -size % group)).view(-1, group)
    return ((rows - packed.zero.float()[:, None]) * packed.scale[:, None]).flatten()[:size].view(shape)

"""Rice coding of which entries of a long vector are set: the gaps between them in a few bits each (Golomb 1966, Rice 1979).

A gap g is written as g >> b in unary and the b low bits as they are. The three kinds of bits lie apart, so that both ways are array operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

LARGEST = 40


@dataclass(frozen=True)
class Coded:
    """unary: a 1 ends each gap's zeros. low: b bits a gap. Both uint8, packed. count: entries that are set. bits: b."""

    unary: torch.Tensor
    low: torch.Tensor
    count: int
    bits: int


def encode(positions: np.ndarray) -> Coded:
    """positions: int64, rising, from 0. The parameter is the one with the shortest code."""
    import numpy as np

    from ftpipe.compress._packed import to_bits

    gaps = np.diff(positions, prepend=-1) - 1
    count = len(gaps)
    bits = min(range(LARGEST), key=lambda b: int((gaps >> b).sum()) + count * (b + 1)) if count else 0
    ends = np.cumsum((gaps >> bits) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if count else 0, dtype=bool)
    unary[ends] = True
    low = (gaps[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return Coded(to_bits(unary), to_bits(low), count, bits)


def decode(coded: Coded) -> np.ndarray:
    """The positions, int64. Raises ValueError for a code that is not whole."""
    import numpy as np

    from ftpipe.compress._packed import from_bits

    ends = np.flatnonzero(from_bits(coded.unary, 8 * len(coded.unary)))[: coded.count]
    if len(ends) != coded.count or 8 * len(coded.low) < coded.count * coded.bits:
        raise ValueError("the code is cut off")
    high = np.diff(ends, prepend=-1) - 1
    low = from_bits(coded.low, coded.count * coded.bits).reshape(coded.count, coded.bits).astype(np.int64)
    gaps = (high << coded.bits) + low @ (1 << np.arange(coded.bits - 1, -1, -1, dtype=np.int64))
    return np.cumsum(gaps + 1) - 1

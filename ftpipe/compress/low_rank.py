"""Cut an adapter's change to a smaller rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ftpipe.compress.base import Compressor

if TYPE_CHECKING:
    import torch


class LowRank(Compressor):
    """Keeps the largest singular directions of each weight's change, the best approximation of its rank in the Frobenius norm.

    Made for adapters whose rank grew by merging, and for full fine-tunes, whose matrices become a LoRA; of a full fine-tune only matrices can
    be kept so, and changes of other tensors (norms) keep it a set of whole weights.
    """

    rank: int = Field(default=8, ge=1, description="Largest rank of a weight's change.")

    def compress(self, adapter: Path, out: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        from ftpipe.merge._deltas import add, facts_of, norm, read, truncate, write

        exact = read(adapter, base)
        cut = {name: truncate(delta, self.rank) for name, delta in exact.items()}
        whole = norm(exact)
        lost = norm({name: add([delta, cut[name].times(-1)]) for name, delta in exact.items()}) / whole if whole else 0.0
        write(out, cut, facts_of(adapter), base)
        return {"lost": lost, "rank": self.rank}

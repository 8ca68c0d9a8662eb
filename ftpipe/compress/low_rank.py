"""Cut an adapter's change to a smaller rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ftpipe.compress.base import Compressor

if TYPE_CHECKING:
    from ftpipe.merge._given import Given


class LowRank(Compressor):
    """Keeps the largest singular directions of each weight's change, the best approximation of its rank in the Frobenius norm.

    Made for adapters whose rank grew by merging, and for full fine-tunes, whose matrices become a LoRA; of a full fine-tune only matrices can
    be kept so, and changes of other tensors (norms) keep it a set of whole weights.
    """

    rank: int = Field(default=8, ge=1, description="Largest rank of a weight's change.")

    def compress(self, adapter: Path, out: Path, given: Given) -> dict[str, Any]:
        from ftpipe.merge._deltas import Loss, facts_of, read, truncate
        from ftpipe.merge._weights import Writer

        exact, lost = read(adapter, given.base), Loss()
        writer = Writer(out, facts_of(adapter), given.base)
        for number, (name, delta) in enumerate(exact.items()):
            cut = truncate(delta, self.rank)
            lost.count(delta, cut)
            writer.add(name, cut)
            given.progress(number + 1, len(exact), "weights")
        writer.close()
        return {"lost": lost.share, "rank": self.rank}

"""Task arithmetic (Ilharco et al. 2023): the sum of the changes, scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.merge.base import Merger

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class TaskArithmetic(Merger):
    """`W = W_base + scale * sum_i D_i`, with one scale for all tasks. The rank of the sum is at most the sum of the ranks, and the sum is exact.

    Different from `linear` in that nothing is divided by the number of adapters: each keeps `scale` of its effect. For weights of each adapter's own, or
    negative ones, use `linear`.
    """

    keeps_rank: ClassVar[bool] = True

    scale: float = Field(default=0.3, ge=-10, le=10, description="Factor of the summed changes, chosen on held-out data; 0.3 to 0.5 is usual.")

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from ftpipe.merge._deltas import add

        return add([part.times(self.scale) for part in parts.values()])

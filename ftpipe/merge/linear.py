"""Weighted sum of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.merge.base import Merger

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class Linear(Merger):
    """`W = W_base + sum_i w_i D_i`, exactly: the factors of LoRA adapters are concatenated, so that ranks add up, and nothing is averaged apart.

    With equal weights of 1/n it is the plain average of the models. With `rank` it is the SVD merge of LoRAs: the sum is cut to its best
    approximation, found from the small factors, and the loss stated.
    """

    keeps_rank: ClassVar[bool] = True

    weights: dict[str, float] = Field(default={}, description="Weight of each adapter by its stage's name; those left out get 1/n.")

    def check(self, given: Given) -> None:
        super().check(given)
        given.known(self.weights)

    def prepare(self, given: Given) -> dict[str, float]:
        given.said["weights"] = weights = {name: self.weights.get(name, 1 / len(given.adapters)) for name in given.adapters}
        return weights

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from ftpipe.merge._deltas import add

        return add([part.times(state[adapter]) for adapter, part in parts.items()])

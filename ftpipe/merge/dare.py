"""DARE (Yu et al. 2024): drop entries of the changes at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftpipe.merge.base import Merger
from ftpipe.merge.ties import check_weights, elected

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class Dare(Merger):
    """Each entry of a change is dropped with probability `drop` and otherwise divided by `1 - drop`, so that its expectation stays; then they are summed.

    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML 2024. What is dropped depends on the seed, the
    adapter's content and the weight's name, not on order or names. With `combine_by: ties` the sign of each entry is elected as in `ties`, and those that
    agree are averaged; otherwise the changes are summed with weights.
    """

    drop: float = Field(default=0.5, ge=0, lt=1, description="Probability that an entry is dropped.")
    combine_by: Literal["sum", "ties"] = Field(default="sum", description="Add what is left, or elect signs first.")
    weights: dict[str, float] = Field(default={}, description="Weight of each adapter by its stage's name; those left out get 1/n (with ties: 1).")
    scale: float = Field(default=1.0, gt=0, le=10, description="Factor of the merged change.")

    def low_rank(self) -> bool:
        return self.drop == 0 and self.combine_by == "sum"

    def check(self, given: Given) -> None:
        super().check(given)
        if self.combine_by == "ties":
            check_weights(self.weights, given)
        given.known(self.weights)

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from ftpipe.merge._deltas import Delta, add

        left = {a: Delta(dense_=dropped(p.dense(), self.drop, given.generator(a, name))) if self.drop else p for a, p in parts.items()}
        if self.combine_by == "ties":
            return elected({a: d.dense() for a, d in left.items()}, self.weights, "total", self.scale)
        return add([d.times(self.scale * self.weights.get(a, 1 / len(given.adapters))) for a, d in left.items()])


def dropped(dense: torch.Tensor, drop: float, generator: torch.Generator) -> torch.Tensor:
    """`dense` with each entry set to 0 with probability `drop`, the others divided by `1 - drop`. (PEFT's `random_pruning`, with a generator of its own.)"""
    import torch

    keep = torch.rand(dense.shape, generator=generator) >= drop
    return dense * keep / (1 - drop)

"""Weighted sum of adapters (task arithmetic)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ftpipe.errors import ConfigError, nearest
from ftpipe.merge.base import Merger

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta, Deltas


class Linear(Merger):
    """`W = W_base + sum_i w_i D_i`, exactly: the factors of LoRA adapters are concatenated, so that ranks add up, and nothing is averaged apart.

    With equal weights of 1/n it is the plain average of the models. A rank bound cuts the sum to its best approximation and states the loss.
    """

    weights: dict[str, float] = Field(default={}, description="Weight of each adapter by its stage's name; those left out get 1/n.")
    rank: int | None = Field(default=None, ge=1, description="Largest rank of the result; without it the sum is exact.")

    def merge(self, adapters: Mapping[str, Deltas]) -> tuple[dict[str, Delta], dict[str, Any]]:
        from ftpipe.merge._deltas import add, norm, truncate

        for name in self.weights:
            if name not in adapters:
                raise ConfigError(f"there is a weight for {name!r}, which is not merged", remedy=nearest(name, adapters))
        weights = {name: self.weights.get(name, 1 / len(adapters)) for name in adapters}
        changed = sorted({parameter for deltas in adapters.values() for parameter in deltas})
        exact = {p: add([adapters[n][p].times(w) for n, w in weights.items() if p in adapters[n]]) for p in changed}
        said: dict[str, Any] = {"weights": weights, "lost": 0.0}
        if self.rank is None:
            return exact, said
        cut = {p: truncate(d, self.rank) for p, d in exact.items()}
        whole = norm(exact)
        said["lost"] = norm({p: add([d, cut[p].times(-1)]) for p, d in exact.items()}) / whole if whole else 0.0
        return cut, said

"""Model Stock (Jang et al. 2024): how far to go from the base to the average, from the angle between the models."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.errors import ConfigError
from ftpipe.merge.base import Merger

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given

EPS = 1e-8


class ModelStock(Merger):
    """`W = W_base + t mean_i(D_i)` with `t = N c / ((N - 1) c + 1)`, for each weight by itself; c is the cosine of the angle between two changes.

    Made for N >= 2 runs of the same task that differ in their seed: t is where the plane through the tuned weights comes nearest to the centre they
    scatter around, if the scatter is of equal length and at right angles to itself and to the way from the base. For N > 2 the paper names one angle
    and does not say how it is measured; here c is the mean of the pairwise cosines. t is kept within 0 and 1: a negative cosine gives 0, the base.
    An unchanged weight stays the base's.
    """

    paper: ClassVar[str] = "Model Stock: All we need is just a few fine-tuned models"
    keeps_rank: ClassVar[bool] = True

    def check(self, given: Given) -> None:
        super().check(given)
        if len(given.adapters) < 2:
            raise ConfigError("model_stock needs at least two adapters of the same task", remedy="train with another seed, or use wise_ft for one")

    def prepare(self, given: Given) -> Any:
        given.said["ratios"] = {}
        given.said["clamped"] = []

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from ftpipe.merge._deltas import add

        count = len(given.adapters)
        cosine = mean_cosine(list(parts.values()), count)
        ratio = count * cosine / ((count - 1) * cosine + 1 + EPS) if cosine > 0 else 0.0
        if cosine < 0:
            given.said["clamped"].append(name)
        given.said["ratios"][name] = min(ratio, 1.0)
        return add([part.times(min(ratio, 1.0) / count) for part in parts.values()])


def mean_cosine(changes: list[Delta], count: int) -> float:
    """Mean cosine over all pairs of `count` changes; those that are not in the list are zero, and so is their cosine with anything."""
    from ftpipe.merge._deltas import inner

    lengths = [max(inner(d, d), 0.0) ** 0.5 for d in changes]
    total = 0.0
    for i, j in combinations(range(len(changes)), 2):
        cosine = inner(changes[i], changes[j]) / (lengths[i] * lengths[j]) if lengths[i] and lengths[j] else 0.0
        total += min(1.0, max(-1.0, cosine))
    return total / (count * (count - 1) / 2)

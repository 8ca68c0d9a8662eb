"""Uniform model soup (Wortsman et al. 2022): the plain average of all models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.merge.base import Merger

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class UniformSoup(Merger):
    """`W = 1/K sum_k W_k` for K models that were tuned from one base, whatever their hyperparameters.

    Averaged are the models, that is the merged changes B A, never A and B apart. A weight that one of them did not tune counts as the base's.
    """

    paper: ClassVar[str] = "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time"
    keeps_rank: ClassVar[bool] = True

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from ftpipe.merge._deltas import add

        return add([part.times(1 / len(given.adapters)) for part in parts.values()])

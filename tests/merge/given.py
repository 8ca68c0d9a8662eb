"""Changes made up in memory, and what a merging method is given with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ftpipe.merge._deltas import Delta
from ftpipe.merge._given import Given
from ftpipe.merge.base import Merger


def dense(values: Any) -> Delta:
    return Delta(dense_=torch.as_tensor(values, dtype=torch.float32))


def given(adapters: Mapping[str, Mapping[str, Any]], **fields: Any) -> Given:
    """Adapters by name: a tensor, a nested list or a `Delta` for each weight."""
    deltas = {a: {n: d if isinstance(d, Delta) else dense(d) for n, d in changes.items()} for a, changes in adapters.items()}
    return Given(adapters=deltas, **fields)


def merge(method: Merger, given: Given) -> dict[str, torch.Tensor]:
    """The merged changes as matrices, without the stage."""
    method.check(given)
    state = method.prepare(given)
    return {name: method.combine(name, given.parts(name), given, state).dense() for name in given.names}

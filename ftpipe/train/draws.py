"""Random numbers that belong to a row, whichever micro-batch or rank it is in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ftpipe.train.run import Batch, Run, derive_seed

if TYPE_CHECKING:
    import torch


def draws(run: Run, batch: Batch, purpose: str) -> Iterator[tuple[int, int, torch.Generator]]:
    """Start, end and random numbers of each sequence of the batch.

    The numbers depend on (seed, purpose, step, row, which of the row's sequences) alone: a row is disturbed the same way whichever micro-batch or rank it is
    in, so that neither packing nor accumulation changes what is learnt. A row that one step shows twice is disturbed the same way twice.
    """
    import torch

    spans = batch.spans()
    each = max(1, len(spans) // len(batch.row_ids))
    for i, (start, end) in enumerate(spans):
        row = batch.row_ids[min(i // each, len(batch.row_ids) - 1)]
        yield start, end, torch.Generator(run.device).manual_seed(derive_seed(run.seed, purpose, run.step, row, i % each))

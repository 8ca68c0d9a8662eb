"""Numbers of tokens added up by sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.train.run import Batch

if TYPE_CHECKING:
    import torch


def totals(values: torch.Tensor, batch: Batch, sequences: int) -> torch.Tensor:
    """The sum of one number a trained token, [K], by sequence: [sequences]."""
    import torch

    return torch.zeros(sequences, dtype=values.dtype, device=values.device).index_add(0, batch.sequence, values)


def means(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The mean by sequence, of the sequences that have a trained token."""
    import torch

    sequences = len(batch.spans())
    counts = totals(torch.ones_like(values), batch, sequences)
    return (totals(values, batch, sequences) / counts)[counts > 0]

"""Supervised fine-tuning: cross-entropy of the response tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ftpipe.train.objective.base import Objective
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch


class Sft(Objective):
    """Mean over all trained tokens of a step of -log p(token | what came before); prompts are read, not learnt. Every token weighs the same,
    whichever row, micro-batch or rank it is in. Of a preference pair the chosen answer is learnt, and an answer that was called bad is not.
    """

    formats: ClassVar[tuple[str, ...]] = ("messages", "text", "preference", "unpaired")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    side_by_side: ClassVar[bool] = True
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.forward",)

    def loss(self, run: Run, batch: Batch) -> torch.Tensor:
        from ftpipe.train.forward import token_losses

        return token_losses(run.model, batch).sum()

"""Dynamic fine-tuning: the cross-entropy of each response token, weighted by the probability the model gives it now."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ftpipe.train.objective.base import Objective
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch


class Dft(Objective):
    """-stopgrad(p) log p of each trained token, p its probability at temperature 1, over the *number* of trained tokens (Wu et al. 2025).

    A token's gradient is p times that of `sft`: what the model holds impossible hardly moves it. The weights also shorten the step, for their sum is not
    divided out. The loss is no measure of progress (it rises while p goes from 0 to 1/e, its maximum): compare runs by `cross_entropy`, recorded beside it.
    """

    paper: ClassVar[str] = "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification"
    formats: ClassVar[tuple[str, ...]] = ("messages", "text", "preference", "unpaired")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    side_by_side: ClassVar[bool] = True
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.forward",)

    def loss(self, run: Run, batch: Batch) -> torch.Tensor:
        from ftpipe.train.forward import token_losses

        losses = token_losses(run.model, batch)
        run.sums["cross_entropy"] = run.sums.get("cross_entropy", 0.0) + float(losses.detach().sum()) * batch.weight
        return (losses.detach().neg().exp() * losses).sum()

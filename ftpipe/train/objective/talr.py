"""Token-adaptive loss reweighting: hard tokens count less, by a temperature that follows the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.train.objective._sequences import means
from ftpipe.train.objective.base import Objective
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch

LEAST = 1e-6
"""Smallest temperature."""


class Talr(Objective):
    """w_i * -log p_i of each trained token, w_i = max(p_i^(1/tau), floor) without a gradient, over the number of trained tokens.

    But for the floor the weights minimise sum w_i l_i + tau sum w_i log w_i up to a constant factor: they are not divided by their sum, so small weights
    shorten the step too; `weight` records their mean. tau is the median over the sequences of an optimizer step, on all ranks, of a sequence's mean loss. It
    falls as the model learns, and hard tokens come back. Since it belongs to the whole step it is found in a forward pass of its own before the step, a third
    more work; a fixed tau saves that. tau = 1 with floor 0 is `dft`, an endless tau is `sft`.
    """

    paper: ClassVar[str] = "SFT Doesn't Always Hurt General Capabilities: Revisiting Domain-Specific Fine-Tuning in LLMs"
    formats: ClassVar[tuple[str, ...]] = ("messages", "text", "preference", "unpaired")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    side_by_side: ClassVar[bool] = True
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.forward",)

    tau: float | None = Field(default=None, gt=0, description="Temperature in nats, fixed; the median loss of the step's sequences if not set.")
    floor: float = Field(default=0.01, ge=0, le=1, description="Least weight of a token, so that none is switched off.")

    def before_step(self, run: Run, batches: Sequence[Batch]) -> None:
        from statistics import median

        tau = self.tau
        if tau is None:
            found = [run.engine.look(batch, sequence_losses) for batch in batches]
            tau = max(median(run.gather([v for batch, part in zip(batches, found, strict=True) if batch.weight for v in part.tolist()])), LEAST)
        run.cache["talr"] = run.metrics["tau"] = tau

    def loss(self, run: Run, batch: Batch) -> torch.Tensor:
        from ftpipe.train.forward import token_losses

        losses = token_losses(run.model, batch)
        weights = (-losses.detach() / run.cache["talr"]).exp().clamp_min(self.floor)
        for name, value in (("cross_entropy", losses.detach().sum()), ("weight", weights.sum())):
            run.sums[name] = run.sums.get(name, 0.0) + float(value) * batch.weight
        return (weights * losses).sum()


def sequence_losses(run: Run, batch: Batch) -> torch.Tensor:
    """Mean loss of the trained tokens of each sequence."""
    from ftpipe.train.forward import token_losses

    return means(token_losses(run.model, batch), batch)

"""Micro-batches of a rank that are computed side by side.

Gradients are added up in the order in which micro-batches are begun, whoever is done first, and DeepSpeed is given their sum, so that the same run
gives the same bytes. It is done only where a micro-batch's loss can be seen to touch nothing but its own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftpipe.models.lanes import Lanes, in_order, possible
from ftpipe.train.forward import check_loss
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch


BEGINNING = 28
"""What a micro-batch takes however small it is, in tokens (0.12 s of 4.3 ms, on a 135M model)."""


def make(run: Run, threads: int) -> Lanes | None:
    """The lanes of a run that has these threads; None if its parts do not allow for more than one micro-batch at a time.

    They do if the objective says so, nothing acts on batches or forward passes from outside, and the model's layers hold all that trains.
    """
    says = next(vars(c).get("side_by_side") for c in type(run.objective).__mro__ if "loss" in vars(c))  # who overrides `loss` has to say so anew
    return Lanes(threads) if says and not run.regularizers and run.zero < 3 and possible(run.model, threads) else None


@dataclass
class Gradients:
    """The sum of the losses of a step's micro-batches, and for each parameter of their gradients, float32."""

    loss: float
    parameters: Sequence[torch.nn.Parameter]
    sums: list[torch.Tensor]

    def as_loss(self) -> torch.Tensor:
        """A loss whose backward pass gives the parameters these gradients."""
        import torch

        class Given(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
                return torch.tensor(self.loss)

            @staticmethod
            def backward(ctx: Any, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return tuple(g * up for g in self.sums)

        return Given.apply(*self.parameters)


def gradients(run: Run, batches: Sequence[Batch], share: float, parameters: Sequence[torch.nn.Parameter]) -> Gradients:
    """Forward and backward passes of these micro-batches, the loss of each times `share`. Raises what the first of them raised that failed."""
    import torch

    from ftpipe.models.kernels.layer import unchanging

    def one(batch: Batch) -> tuple[float, Sequence[torch.Tensor | None], dict[str, float]]:
        own = replace(run, sums={})
        with run.autocast():
            loss = run.objective.loss(own, batch).float() * (batch.weight * share)
        value = float(loss.detach())
        check_loss(value)
        return value, torch.autograd.grad(loss, parameters, allow_unused=True), own.sums

    batches = [batches[i] for i in in_order([b.tokens + BEGINNING for b in batches])]
    found = Gradients(0.0, parameters, [torch.zeros_like(p) for p in parameters])
    with unchanging():
        for batch, (loss, grads, sums) in zip(batches, run.lanes.results(one, batches)):
            run.alive(f"step {run.step + 1}, a micro-batch of {batch.tokens} tokens")
            found.loss += loss
            for total, gradient in zip(found.sums, grads, strict=True):
                if gradient is not None:
                    total += gradient
            for name, value in sums.items():
                run.sums[name] = run.sums.get(name, 0.0) + value
    return found

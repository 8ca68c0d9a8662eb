"""MeZO (Malladi et al. 2023): fine-tuning with forward passes alone.

A step draws one direction z, a standard normal for each trained element, looks at the loss a little way along it and a little way back, and moves by
the slope between them (algorithm 1 of the paper, with one direction a step):

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps);    theta <- theta - rate (g z + weight_decay theta)

The mean of g z over z is the gradient as eps goes to 0. z is drawn again from its seed, tensor by tensor, whenever it is needed, and is never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError, TrainingError
from ftpipe.train.optimizer.base import Optimizer
from ftpipe.train.run import Batch, Run, derive_seed

if TYPE_CHECKING:
    import torch

    from ftpipe.stages.train import Train


class Mezo(Optimizer):
    """Zeroth-order SGD in place: no backward pass, no gradients and no optimizer state, so that training takes the memory of inference, plus the
    float32 copy of what trains that every method here has, plus one direction for the largest tensor.

    Both forward passes run over the same rows, in evaluation mode (no dropout) and with the same random state. The recorded loss is the mean of the
    two, the recorded norm |g|, and the metric `mezo_slope` is g: start, seed and the recorded slopes and rates are enough to make the run again.
    theta is put back by adding eps z: right to float32 rounding (1e-6 of the larger of |theta| and |eps z|), not to the bit. A rate of zero (the first
    step of a warmup) measures the loss once and moves nothing.

    Needs a small rate (about 1e-6 for full tuning, 1e-4 for LoRA), thousands of steps, and the `constant` schedule to be what the paper did: a step's
    length grows with the root of the number of trained elements. Weight decay leaves out tensors of one dimension (biases, norms).
    """

    paper: ClassVar[str] = "Fine-Tuning Language Models with Just Forward Passes"
    zero_stages: ClassVar[tuple[int, ...]] = (0,)
    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    eps: float = Field(default=1e-3, gt=0, description="How far along the direction the loss is looked at; in the paper 1e-3 for full tuning, 1e-2 for LoRA, "
                       "1e-1 for prefixes.")
    weight_decay: float = Field(default=0.0, ge=0, description="Share of a parameter taken off per step, times the learning rate.")

    def check(self, stage: Train) -> None:
        if deaf := [m.name() for m in stage.act_on_gradients()]:
            raise ConfigError(f"{self.name()} has no gradients, and {deaf[0]} acts on them", remedy=f"leave {deaf[0]} out, or take another optimizer")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=0.0)  # holds the groups and their rates; its step is never taken

    def take_step(self, run: Run, batches: Sequence[Batch]) -> float:
        import torch

        groups = run.engine.optimizer.param_groups
        training = run.model.training
        run.model.eval()
        try:
            with torch.no_grad():
                if not any(group["lr"] for group in groups):
                    run.engine.norm, run.metrics["mezo_slope"] = 0.0, 0.0
                    return self._total(run, batches)[0]
                self._move(run, groups, self.eps)
                up, up_all = self._total(run, batches)
                self._move(run, groups, -2 * self.eps)
                down, down_all = self._total(run, batches)
                slope = (up_all - down_all) / (2 * self.eps)
                self._update(run, groups, slope)
        finally:
            run.model.train(training)
        run.engine.norm, run.metrics["mezo_slope"] = abs(slope), slope
        return (up + down) / 2

    def directions(self, run: Run, groups: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], torch.nn.Parameter, torch.Tensor]]:
        """Each trained tensor once, with its group and its part of this step's direction: the same each time, on every rank and after a resume."""
        import torch

        generator = None
        for group in groups:
            for parameter in group["params"]:
                if generator is None:
                    generator = torch.Generator(device=parameter.device).manual_seed(derive_seed(run.seed, "mezo", run.step))
                yield group, parameter, torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)

    def _move(self, run: Run, groups: Sequence[dict[str, Any]], by: float) -> None:
        for _, parameter, z in self.directions(run, groups):
            parameter.add_(z, alpha=by)

    def _update(self, run: Run, groups: Sequence[dict[str, Any]], slope: float) -> None:
        for group, parameter, z in self.directions(run, groups):
            parameter.add_(z, alpha=self.eps)
            if self.weight_decay and parameter.dim() > 1:
                parameter.mul_(1 - group["lr"] * self.weight_decay)
            parameter.add_(z, alpha=-group["lr"] * slope)

    def _total(self, run: Run, batches: Sequence[Batch]) -> tuple[float, float]:
        """The step's loss where the parameters are now: this rank's part, and the mean over all ranks."""
        own = sum(float(run.engine.loss(batch)) for batch in batches)
        total = run.sum(own) / run.world
        if not math.isfinite(total):
            raise TrainingError(f"the loss is {total}", remedy="lower the learning rate or `eps`, or look at these rows")
        return own, total

"""Component-wise gradient norm clipping (Yang and Ma 2022): each tensor's gradient is held to a length of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError, TrainingError
from ftpipe.train.regularizer.base import Regularizer
from ftpipe.train.run import Run

if TYPE_CHECKING:
    from ftpipe.stages.train import Train

TINY = 1e-6
"""Added to a norm before the threshold is divided by it, as torch's own clipping does."""


class ComponentClip(Regularizer):
    """g <- g min(1, threshold / (|g| + 1e-6)) for each trained tensor by itself, once a step, over the step's whole gradient.

    A component is a tensor: a weight matrix, a bias, a norm. One that explodes leaves all others as they are, where the usual clipping of the whole
    gradient would shrink them. It takes that clipping's place, so the stage's `clip` must be 0, and it comes after all else that acts on gradients.
    The optimizer is AdamW in the paper; Adam hardly feels a threshold that binds at every step, since it divides a constant factor out again.
    Records `component_clipped`, the share of tensors that were shortened. Under ZeRO 1 to 3 each tensor's gradient is put together from all ranks.
    """

    paper: ClassVar[str] = "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient Norm Clipping"
    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    threshold: float = Field(default=1.0, gt=0, description="Largest norm of one tensor's gradient; the paper searches 0.01 to 5.")

    def check(self, stage: Train) -> None:
        if stage.clip:
            raise ConfigError(f"{self.name()} takes the place of clipping the whole gradient, and clip is {stage.clip:g}", remedy="set clip: 0")
        if (last := stage.act_on_gradients()[-1]) is not self:
            raise ConfigError(f"{last.name()} would change gradients that {self.name()} has clipped", remedy=f"put {self.name()} last among the regularizers")

    def on_gradients(self, run: Run) -> None:
        import torch

        clipped = 0
        for name in run.engine.names:
            gradient = run.engine.gradient(name)
            norm = torch.linalg.vector_norm(gradient)
            if not math.isfinite(float(norm)):
                raise TrainingError(f"the gradient of {name} has norm {float(norm)}", remedy="lower the learning rate, or look at these rows")
            factor = self.threshold / (norm + TINY)
            if float(factor) < 1:
                run.engine.set_gradient(name, gradient * factor)
                clipped += 1
        run.metrics["component_clipped"] = clipped / len(run.engine.names)

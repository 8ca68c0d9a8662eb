"""L2 distance from the start: pulls what trains towards where it started."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ftpipe.train.regularizer.base import Regularizer
from ftpipe.train.run import Run


class L2Start(Regularizer):
    """Adds strength / 2 * sum((theta - theta_0)^2) over all trained parameters, by its gradient strength * (theta - theta_0).

    The gradient is added between backward and update, where every ZeRO stage can reach it; clipping sees the sum. For LoRA theta_0 is
    the random A and the zero B. Unlike weight decay it does not pull towards zero.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    strength: float = Field(default=0.01, ge=0, description="Weight of the penalty.")

    def prepare(self, run: Run) -> None:
        run.cache["l2_start"] = {name: p.detach().float().clone() for name, p in run.trainable().items()}

    def on_gradients(self, run: Run) -> None:
        penalty = 0.0
        for name, start in run.cache["l2_start"].items():
            if name in run.engine.names:
                away = run.engine.value(name) - start.to(run.device)
                run.engine.set_gradient(name, run.engine.gradient(name) + self.strength * away)
                penalty += self.strength / 2 * float(away.square().sum())
        run.metrics["l2_start"] = penalty

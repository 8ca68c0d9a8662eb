"""The base of optimizers: how a step is taken."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch

    from ftpipe.stages.train import Train


class Optimizer(Method):
    """Builds the torch optimizer and takes the step.

    Class attributes:
        zero_stages: ZeRO stages it works under. Stages above 0 hand the optimizer flat pieces of parameters, so only one that treats every
            element alike may name them; one that looks at a matrix as a whole names only 0.
    """

    slot: ClassVar[str] = "train/optimizer"
    zero_stages: ClassVar[tuple[int, ...]] = (0,)

    def check(self, stage: Train) -> None:
        """Raise ConfigError, before anything runs, if the rest of the stage's settings does not go with the method."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer over parameter groups. The loop sets each group's `lr` before every step.

        A group's `params` are pairs of name and parameter, which torch's optimizers take and keep as `params` and `param_names`.
        """

    def take_step(self, run: Run, batches: Sequence[Batch]) -> float:
        """Forward, backward and update over this rank's micro-batches; returns the sum of their losses.

        `run.engine.loss(batch)` is the batch's part of the step's mean loss, times the number of ranks (DeepSpeed averages over them). All ranks hold
        equally many micro-batches. A method without a backward pass overrides this, and sets `run.engine.norm`.
        """
        total = run.engine.gradients(batches)
        run.engine.on_gradients()
        run.engine.update()
        return total

"""The base of regularizers: a term added to any objective, or a disturbance of the inputs or of the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch

    from ftpipe.stages.train import Train


class Regularizer(Method):
    """Places to act; a method overrides the ones it needs. Random numbers come from `train.draws`, so that packing does not change them.

    Class attributes:
        zero_stages: ZeRO stages the method works under.
    """

    slot: ClassVar[str] = "train/regularizer"
    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)

    def check(self, stage: Train) -> None:
        """Raise ConfigError, before anything runs, if the rest of the stage's settings does not go with the method."""

    def prepare(self, run: Run) -> None:
        """Called once, when the model is prepared and nothing has been trained yet (also before a resume restores what was)."""

    def inputs(self, run: Run, batch: Batch) -> Batch:
        """The micro-batch to train on in place of this one, of the same rows and tokens: other `input_ids`, notes in `extra` (use `dataclasses.replace`).
        Called once a micro-batch and step."""
        return batch

    def before_step(self, run: Run, batches: Sequence[Batch]) -> None:
        """Called with all micro-batches of this rank before the first is trained on; see `Objective.before_step`."""

    def objective_weight(self, run: Run) -> float:
        """What the objective's loss is multiplied by, for a method that divides a whole between the objective and its own term."""
        return 1.0

    def forward(self, run: Run, batch: Batch) -> AbstractContextManager[Any]:
        """A context around every forward pass of the objective (hooks that add noise, ...)."""
        return nullcontext()

    def penalty(self, run: Run, batch: Batch) -> torch.Tensor | None:
        """A scalar of this batch's activations to be added to the loss. It is weighted by the batch's share of the step's count, so that the
        step's penalty is a mean. Not for penalties on parameters: those are not there under ZeRO 3; use `on_gradients`."""
        return None

    def on_gradients(self, run: Run) -> None:
        """Called between backward and update: add the gradient of a penalty on parameters (`run.engine.gradient`, `set_gradient`)."""

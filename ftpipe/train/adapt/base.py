"""The base of methods that decide what trains.

    prepare      wrap, freeze and initialise the base model                       once, before the engine is built
    resumed      repeat what a checkpoint does not hold                           after a kill
    before_step  may change what trains from this step on                         each step
    on_gradients read and change the step's gradients                             each step, between backward and update
    after_step   read and change parameters                                       each step, after the update
    save, load   write what was learnt; put it on a base model again
    merge        fold it into the base model's own weights
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method
from ftpipe.train.run import Change, Run

if TYPE_CHECKING:
    import torch


class Adapt(Method):
    """Decides what trains and where it starts.

    Class attributes:
        zero_stages: ZeRO stages the method works under.
        quantized: methods of models/quantize on whose bases it trains. Not inherited: a subclass that reads or changes the base's weights finds them packed.
        packs: False if the method prepends something to the sequence (prompt tuning), so that rows cannot share one.
    """

    slot: ClassVar[str] = "train/adapt"
    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    quantized: ClassVar[tuple[str, ...]] = ()
    packs: ClassVar[bool] = True

    def trains_beside(self, quantize: str) -> bool:
        """Whether it trains, with these settings, on a base whose linear layers the method `quantize` of models/quantize made small."""
        return quantize in vars(type(self)).get("quantized", ())

    def looks_at(self) -> str | None:
        """The stage whose rows `run.calibration` shows to `prepare`; None for those of training."""
        return None

    def sized(self, size: int) -> Adapt | None:
        """The method with another size, which is 1 or more, where one of its settings says how much trains (a rank, a width): more trains with a larger size.
        None if there is no such setting. Raises ValueError for a size that the setting cannot have."""
        return None

    def with_fields(self, **fields: Any) -> Adapt:
        """The method with other values of some fields, checked as those of the YAML are."""
        return type(self)(**(self.model_dump() | fields))

    def outline(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        """What `prepare` makes, in names and shapes alone: `model` may be on the meta device, and there are no rows to look at. A method whose `prepare` reads
        weights or rows writes this too, if what trains can be told without them."""
        return self.prepare(model, run)

    @abstractmethod
    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        """The model to train, from a base model whose parameters are all frozen and in `run.dtype`.

        Sets `requires_grad` on what trains and makes it float32. The random state is seeded from `run.seed` before the call. Must give
        the same on every rank and every time. `run.model` is not set yet.
        """

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer. Beside torch's own keys a group may hold `lr_scale`, a factor of the learning rate."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def resumed(self, run: Run) -> None:
        """Called when a checkpoint was put back, before the engine is built: parameters that train or have trained and `run.memory` are as they were.
        A method that changed frozen weights does so again."""

    def before_step(self, run: Run) -> Change | None:
        """Called before each step; a `Change` makes the loop rebuild the engine and carry over all other optimizer state."""

    def on_gradients(self, run: Run) -> None:
        """Called between backward and update, when `run.engine.gradient(name)` holds the gradient of the whole step over all ranks."""

    def after_step(self, run: Run) -> None:
        """Called after the update, when `run.engine.value(name)` holds the new parameters."""

    def without(self, model: torch.nn.Module) -> AbstractContextManager[Any] | None:
        """A context in which the prepared model behaves like the base model, or None if the method cannot undo itself."""
        return None

    def keeps(self, model: torch.nn.Module) -> list[str]:
        """Names of frozen parameters that `save` needs beside the trained ones (fixed random projections)."""
        return []

    @abstractmethod
    def save(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write safetensors and JSON into `folder`, no pickle, the same bytes every time.

        Args:
            model: the prepared model; under ZeRO 3 its parameters may be empty, so take no values from it.
            state: the trained parameters and those of `keeps` by their name in `model`, whole, on the CPU; what was trained is float32.
        """

    @abstractmethod
    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """The base model `model` with what `save` wrote, for inference, in the base model's type."""

    @abstractmethod
    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model that `load` returned as a plain base model with changed weights. Raises ConfigError if the method has no such form."""


def extra_methods() -> dict[str, Callable[[], type[Method]]]:
    """Every tuner of the installed PEFT that has no file of its own here, under PEFT's own name."""
    from ftpipe.train.adapt import _peft_family

    return _peft_family.methods()


def refused_methods() -> dict[str, str]:
    """Tuners of PEFT that a training run cannot serve, with the reason."""
    from ftpipe.train.adapt import _peft_family

    return dict(_peft_family.REFUSED)

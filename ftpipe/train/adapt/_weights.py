"""What methods share that train the base model's own weights: saved under the base model's names, whole or only where they changed."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights.safetensors"
INDEX = "weights.safetensors.index.json"
"""Which file holds which tensor, where they are too large for one file."""


class WeightsAdapt(Adapt):
    """Trains the parameters that `chosen` names. The adapter holds their new values as float32; loading rounds them to the base model's type."""

    libraries: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._weights", "ftpipe.models.sparse")

    @abstractmethod
    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        """Names of the parameters that train at first. Raises ConfigError if there are none."""

    def only_changed(self) -> bool:
        """Whether `save` writes only the entries that differ from the base model. It then loads the base model once more, to compare."""
        return False

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        names = set(self.chosen(model, run))
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        model.load_start = run.load_base  # `save` is not given the run
        return model

    def save(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        write(self.changed(model, state) if self.only_changed() else {n: state[n].contiguous().clone() for n in state}, folder)

    def changed(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of the trained parameters the entries that differ from the base model, as tensors of the sparse format."""
        from ftpipe.models.sparse import smallest

        start = dict(model.load_start().named_parameters())
        parts = {n: smallest(value, start[n]) for n, value in state.items()}
        return {key: tensor for name, part in parts.items() if part is not None for key, tensor in part.tensors(name).items()}

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        from ftpipe.models.sparse import put
        from ftpipe.models.weights import Tensors

        put(model, Tensors(tensor_files(folder)), str(folder))
        return model.eval()

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        return model


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of an adapter of whole weights; empty for other adapters. Raises ArtifactError for an unreadable index or a missing file."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        try:
            files = {name: folder / Path(file).name for name, file in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the index of the weights cannot be read: {error}", where=str(folder / INDEX)) from error
        if missing := sorted({p.name for p in files.values() if not p.is_file()}):
            raise ArtifactError(f"weight files are missing: {', '.join(missing[:3])}", where=str(folder), remedy="copy or make the adapter again")
        return dict(sorted(files.items()))
    if not (folder / WEIGHTS).is_file():
        return {}
    with safe_open(folder / WEIGHTS, framework="pt") as f:
        return dict.fromkeys(sorted(f.keys()), folder / WEIGHTS)


class MaskedAdapt(WeightsAdapt):
    """Trains single entries of some tensors: `masks` says which; the others keep their values exactly.

    Their gradient is set to zero before each update from the first step on, so that an optimizer that treats every element alike leaves them where they
    are: its moments stay zero. Weight decay would move them, and pull scales and biases to zero besides, so it is off for all that trains.
    """

    def masks(self, run: Run) -> Mapping[str, torch.Tensor]:
        """For each tensor that trains in part: a bool tensor of its shape, true where it trains."""
        return {}

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        return [group | {"weight_decay": 0.0} for group in super().groups(model)]

    def on_gradients(self, run: Run) -> None:
        for name, mask in self.masks(run).items():
            gradient = run.engine.gradient(name)
            run.engine.set_gradient(name, gradient * mask.to(gradient.device))


def write(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write `weights.safetensors`, the same bytes every time."""
    from safetensors.torch import save_file

    save_file({n: tensors[n] for n in sorted(tensors)}, folder / WEIGHTS, metadata={"format": "pt"})


def refuse_empty(names: list[str], what: str, remedy: str) -> list[str]:
    """`names`, or a ConfigError that says there is nothing to train."""
    if not names:
        raise ConfigError(f"the model has no {what} to train", remedy=remedy)
    return names

"""What methods share that train the base model's own weights: saved as whole tensors under the base model's names."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights.safetensors"
INDEX = "weights.safetensors.index.json"
"""Which file holds which tensor, where they are too large for one file."""


class WeightsAdapt(Adapt):
    """Trains the parameters that `chosen` names. The adapter holds their new values in the base model's type."""

    libraries: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._weights",)

    @abstractmethod
    def chosen(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that train. Raises ConfigError if there are none."""

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        names = set(self.chosen(model))
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        return model

    def save(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({n: state[n].contiguous().clone() for n in sorted(state)}, folder / WEIGHTS, metadata={"format": "pt"})

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        import torch
        from safetensors import safe_open

        parameters = dict(model.named_parameters())
        for name, file in tensor_files(folder).items():
            with safe_open(file, framework="pt") as f:
                value = f.get_tensor(name)
            if name not in parameters or parameters[name].shape != value.shape:
                raise ArtifactError(f"tensor {name} {list(value.shape)} does not fit the base model", where=str(folder))
            with torch.no_grad():
                parameters[name].copy_(value)
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


def refuse_empty(names: list[str], what: str, remedy: str) -> list[str]:
    """`names`, or a ConfigError that says there is nothing to train."""
    if not names:
        raise ConfigError(f"the model has no {what} to train", remedy=remedy)
    return names

"""What methods share that train the base model's own weights: saved as whole tensors under the base model's names."""

from __future__ import annotations

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
        from safetensors.torch import load_file

        parameters = dict(model.named_parameters())
        for name, value in load_file(folder / WEIGHTS).items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ArtifactError(f"tensor {name} {list(value.shape)} does not fit the base model", where=str(folder))
            with torch.no_grad():
                parameters[name].copy_(value)
        return model.eval()

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        return model


def refuse_empty(names: list[str], what: str, remedy: str) -> list[str]:
    """`names`, or a ConfigError that says there is nothing to train."""
    if not names:
        raise ConfigError(f"the model has no {what} to train", remedy=remedy)
    return names

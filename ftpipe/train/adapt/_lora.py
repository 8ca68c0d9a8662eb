"""What all methods share that train a low-rank pair of matrices beside frozen linear layers: which layers, which rank, which scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.train.adapt._peft import PeftAdapt
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


class LoraFamily(PeftAdapt):
    """h = W x + s B A x with B (outputs x r) and A (r x inputs); s = alpha / r, or alpha / sqrt(r) with rslora."""

    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._peft", "ftpipe.train.adapt._lora")

    r: int = Field(default=16, ge=1, description="Rank of the change.")
    alpha: float = Field(default=32, gt=0, description="Scale of the change: it is multiplied by alpha / r (alpha / sqrt(r) with rslora).")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of a layer's inputs that are dropped before A, during training.")
    target_modules: list[str] | str = Field(default="all-linear", description="Names (or ends of names) of the layers to adapt, a regular expression, or "
                                            "`all-linear` for every linear layer but the output layer.")
    layers: list[int] | None = Field(default=None, description="Numbers of the transformer layers to adapt, from 0; all if not set.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r), so that a higher rank does not learn more slowly.")

    def sized(self, size: int) -> Adapt:
        # What multiplies B A stays as it is: a rank chosen to save parameters is not to change how fast the adapter learns.
        scale = self.alpha and self.alpha * ((size / self.r) ** 0.5 if self.rslora else size / self.r)
        return self.with_fields(r=size, alpha=scale)

    def outline(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        return PeftAdapt.prepare(self, model, run)

    def config(self) -> LoraConfig:
        return self.lora_config()

    def lora_config(self, **more: Any) -> LoraConfig:
        """PEFT's configuration of these fields, and what else a method sets."""
        from peft import LoraConfig

        return LoraConfig(**{"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": self.target_modules,
                             "layers_to_transform": self.layers, "use_rslora": self.rslora, "bias": "none", "task_type": "CAUSAL_LM"} | more)


def lora_layers(model: torch.nn.Module, method: str) -> dict[str, Any]:
    """PEFT's LoRA layers of a wrapped model by name. Raises ConfigError for one that is not over a linear layer of floating-point weights."""
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in found.items():
        base = layer.get_base_layer()
        if not isinstance(base, (torch.nn.Linear, Conv1D)) or not base.weight.is_floating_point():
            raise ConfigError(f"{method} starts from the weights or inputs of linear layers, and {name} is a {type(base).__name__}",
                              remedy="leave it out of target_modules")
    return found


def weight_of(layer: Any) -> torch.Tensor:
    """The frozen weight of a LoRA layer, float32 [outputs, inputs] (a copy)."""
    import torch

    weight = layer.get_base_layer().weight.detach()
    return (weight.T if layer.fan_in_fan_out else weight).to(torch.float32, copy=True)

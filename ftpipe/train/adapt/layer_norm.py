"""Trains the scales (and biases) of normalisation layers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ftpipe.train.adapt._weights import WeightsAdapt, refuse_empty

if TYPE_CHECKING:
    import torch


class LayerNorm(WeightsAdapt):
    """Every parameter of a module whose class name contains `norm` (LayerNorm, RMSNorm and their kin)."""

    quantized: ClassVar[tuple[str, ...]] = ("int8", "nf4")

    def chosen(self, model: torch.nn.Module) -> list[str]:
        names = [f"{m}.{p}" if m else p for m, module in model.named_modules() if "norm" in type(module).__name__.lower()
                 for p, _ in module.named_parameters(recurse=False)]
        return refuse_empty(names, "normalisation layer", "choose another method of train/adapt")

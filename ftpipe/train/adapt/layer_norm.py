"""Trains the scales (and biases) of normalisation layers only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.train.adapt._weights import WeightsAdapt, refuse_empty
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch


class LayerNorm(WeightsAdapt):
    """Every parameter of a module whose class name contains `norm` (LayerNorm, RMSNorm and their kin)."""

    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        names = [f"{m}.{p}" if m else p for m, module in model.named_modules() if "norm" in type(module).__name__.lower()
                 for p, _ in module.named_parameters(recurse=False)]
        return refuse_empty(names, "normalisation layer", "choose another method of train/adapt")

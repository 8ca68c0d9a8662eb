"""Full fine-tuning: every parameter, or those whose names match."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic import Field

from ftpipe.slots import Pattern
from ftpipe.train.adapt._weights import WeightsAdapt, refuse_empty
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch


class Full(WeightsAdapt):
    """Trains the base model's own weights, with float32 masters. The adapter is as large as what trains."""

    parameters: Pattern = Field(default="", description="Regular expression; only parameters whose name it is found in train. Empty: all.")

    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        names = [n for n, _ in model.named_parameters() if re.search(self.parameters, n)]
        return refuse_empty(names, f"parameter that matches {self.parameters!r}", "see the names in the model's safetensors index")

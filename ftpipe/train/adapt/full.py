"""Full fine-tuning: every parameter, or those whose names match."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from ftpipe.train.adapt._weights import WeightsAdapt, refuse_empty
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch


class Full(WeightsAdapt):
    """Trains the base model's own weights, with float32 masters. The adapter is as large as what trains."""

    parameters: str = Field(default="", description="Regular expression; only parameters whose name it is found in train. Empty: all.")

    @field_validator("parameters")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        names = [n for n, _ in model.named_parameters() if re.search(self.parameters, n)]
        return refuse_empty(names, f"parameter that matches {self.parameters!r}", "see the names in the model's safetensors index")

"""Sampling with temperature and nucleus."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ftpipe.decode.base import Decoder


class Sampling(Decoder):
    """Draws each token from the softmax of logits / temperature, cut to the smallest set of tokens whose probabilities sum to `top_p` or more."""

    libraries: ClassVar[tuple[str, ...]] = ("transformers", "torch")

    temperature: float = Field(default=0.7, gt=0, le=10, description="Divides the logits: below 1 sharpens, above 1 flattens.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Probability mass of the nucleus that is kept; 1 keeps all tokens.")

    def settings(self) -> dict[str, Any]:
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

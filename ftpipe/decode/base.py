"""The base of decoding methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import torch

    from ftpipe.models.service import ModelService


@dataclass(frozen=True)
class DecodeRun:
    """What a decoding method is given for one batch of prompts.

    service: the model that generates, with its tokenizer and device. env: to load further models with; None if the caller gave none.
    input_ids, attention_mask: (batch, width) prompts, padded on the left.
    """

    service: ModelService
    env: Environment | None
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class Decoder(Method):
    """Decides how tokens are chosen, in terms of transformers' generation. A subclass writes `settings`, `processors`, or both.

    transformers applies the processors to the raw logits (float32) of the last position first, then temperature and top-p, then samples or takes the largest.
    """

    slot: ClassVar[str] = "decode"

    def settings(self) -> dict[str, Any]:
        """Fields of transformers' `GenerationConfig` (do_sample, temperature, top_p, num_beams, ...). Greedy by default."""
        return {"do_sample": False}

    def processors(self, run: DecodeRun) -> list[Any]:
        """Logits processors for one batch, made afresh for it: called as p(input_ids (batch, length so far), scores (batch, vocabulary)) -> scores."""
        return []

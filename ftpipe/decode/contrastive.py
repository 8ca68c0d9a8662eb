"""Contrastive decoding against another model: say what the one that generates finds likelier than the other does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.decode._follower import Follower, follower
from ftpipe.decode.base import Decoder, DecodeRun

if TYPE_CHECKING:
    import torch


class Contrastive(Decoder):
    """Chooses tokens by log p - strength * log q, p being the model that generates (a tuned one) and q another (its base), among those that p finds plausible.

    With strength 1 that is the contrast by which the paper shows what is new in the data that a model was tuned on: the softmax of it is the ratio p / q,
    scaled to 1 over the plausible tokens. With strength 0 it is p. Plausible are the tokens of probability `plausible` times the likeliest one's or more;
    without that bound the largest ratios belong to tokens that neither model would say. It is taken from contrastive decoding, as the paper's text could not
    be checked on it. Of the paper the static form is here: its iterative one tunes the base on each answer before it asks for the next.

    Both models see the same prompt and the same answer so far. Ids beyond the tokenizer (padding of a vocabulary) can not be chosen.
    """

    paper: ClassVar[str] = "What's New in My Data? Novelty Exploration via Contrastive Generation"
    libraries: ClassVar[tuple[str, ...]] = ("transformers", "torch")

    against: str = Field(description="The model to steer away from, such as the base of the one that generates; named like any model.")
    adapter: str | None = Field(default=None, description="Folder of an adapter that is put on `against`.")
    strength: float = Field(default=1.0, ge=0, description="How much of the other model's log-probability is taken away; 0 leaves the model as it is.")
    plausible: float = Field(default=0.1, ge=0, le=1, description="Smallest probability of a token that may be chosen, as a share of the likeliest token's.")
    temperature: float = Field(default=1.0, ge=0, description="Of the contrast; 0 takes the largest.")

    def settings(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}

    def processors(self, run: DecodeRun) -> list[Any]:
        return [Contrast(follower(run, self.against, self.adapter), self.strength, self.plausible, len(run.service.tokenizer))]


class Contrast:
    """Logits processor: log p - strength * log q for the plausible ones of the first `vocabulary` ids, -inf for all others."""

    def __init__(self, other: Follower, strength: float, plausible: float, vocabulary: int):
        self.other, self.strength, self.plausible, self.vocabulary = other, strength, plausible, vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import math

        import torch

        v = self.vocabulary
        ours = scores[:, :v].log_softmax(-1)
        theirs = self.other.logits(input_ids)[:, :v].log_softmax(-1).to(scores.device)
        least = ours.amax(-1, keepdim=True) + (math.log(self.plausible) if self.plausible else -torch.inf)
        contrast = torch.full_like(scores, -torch.inf)
        contrast[:, :v] = torch.where(ours >= least, ours - self.strength * theirs, -torch.inf)
        return contrast

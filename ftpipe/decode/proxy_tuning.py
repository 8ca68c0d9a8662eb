"""Proxy-tuning: steer a model by the difference that tuning made to a smaller one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.decode._follower import Follower, follower
from ftpipe.decode.base import Decoder, DecodeRun
from ftpipe.errors import ConfigError

if TYPE_CHECKING:
    import torch


class ProxyTuning(Decoder):
    """Adds alpha * (expert - anti-expert) to the logits of the model that generates, at every step, before temperature and nucleus (section 2, equation 1).

    The expert is a small tuned model, the anti-expert the same small model untuned; all three share one tokenizer. Each of the two keeps a key-value
    cache of its own and sees the same prompt and the same answer so far. Ids beyond the tokenizer (padding of a vocabulary) can not be chosen.
    """

    paper: ClassVar[str] = "Tuning Language Models by Proxy"
    libraries: ClassVar[tuple[str, ...]] = ("transformers", "torch")

    expert: str = Field(description="Small tuned model, named like any model; with `adapter`, the small base model the adapter belongs to.")
    adapter: str | None = Field(default=None, description="Folder of an adapter that makes `expert` the tuned model.")
    antiexpert: str | None = Field(default=None, description="The small model before tuning; by default `expert` without `adapter`.")
    alpha: float = Field(default=1.0, ge=0, description="How much of the difference is added; 0 leaves the model as it is.")
    temperature: float = Field(default=0.0, ge=0, description="Of the combined logits; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the combined distribution, with a temperature.")

    def settings(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    def processors(self, run: DecodeRun) -> list[Any]:
        if self.adapter is None and self.antiexpert is None:
            raise ConfigError("proxy_tuning needs the small model before and after tuning", remedy="set adapter:, or antiexpert:")
        expert, anti = follower(run, self.expert, self.adapter), follower(run, self.antiexpert or self.expert)
        return [Shift(expert, anti, self.alpha, len(run.service.tokenizer))]


class Shift:
    """Logits processor: scores + alpha * (expert - anti-expert) for the first `vocabulary` ids, -inf for the others."""

    def __init__(self, expert: Follower, anti: Follower, alpha: float, vocabulary: int):
        self.expert, self.anti, self.alpha, self.vocabulary = expert, anti, alpha, vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        v = self.vocabulary
        difference = self.expert.logits(input_ids)[:, :v] - self.anti.logits(input_ids)[:, :v]
        combined = torch.full_like(scores, -torch.inf)
        combined[:, :v] = scores[:, :v] + self.alpha * difference.to(scores.device)
        return combined

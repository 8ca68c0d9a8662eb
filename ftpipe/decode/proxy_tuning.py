"""Proxy-tuning: steer a model by the difference that tuning made to a smaller one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

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
        if run.env is None:
            raise ConfigError("proxy_tuning loads two more models and was not told where", remedy="pass env= to ModelService.generate")
        if self.adapter is None and self.antiexpert is None:
            raise ConfigError("proxy_tuning needs the small model before and after tuning", remedy="set adapter:, or antiexpert:")
        expert = run.service.companion(self.expert, run.env, adapter=run.env.path(self.adapter) if self.adapter else None)
        anti = run.service.companion(self.antiexpert or self.expert, run.env)
        for name, other in ((self.expert, expert), (self.antiexpert or self.expert, anti)):
            if other.tokenizer.get_vocab() != run.service.tokenizer.get_vocab():
                raise ConfigError(f"{name} has another tokenizer than the model that generates", remedy="proxy-tuning needs models that share one")
        return [Shift(expert.model, anti.model, run.attention_mask, self.alpha, len(run.service.tokenizer))]


class Follower:
    """A model that is fed what another one generates, with a key-value cache of its own."""

    def __init__(self, model: Any, mask: torch.Tensor):
        self.model, self.mask, self.cache = model, mask, None
        self.seen = 0

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, vocabulary) float32 logits after `input_ids` (batch, length), of which only what is new goes through the model."""
        import torch

        new = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), new)], dim=1) if new else self.mask
        position = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(input_ids=input_ids[:, self.seen:], attention_mask=mask, position_ids=position[:, self.seen:], past_key_values=self.cache,
                         use_cache=True, logits_to_keep=1)
        self.cache, self.seen = out.past_key_values, input_ids.shape[1]
        return out.logits[:, -1].float()


class Shift:
    """Logits processor: scores + alpha * (expert - anti-expert) for the first `vocabulary` ids, -inf for the others."""

    def __init__(self, expert: Any, anti: Any, mask: torch.Tensor, alpha: float, vocabulary: int):
        self.expert, self.anti = Follower(expert, mask), Follower(anti, mask)
        self.alpha, self.vocabulary = alpha, vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        v = self.vocabulary
        difference = self.expert.logits(input_ids)[:, :v] - self.anti.logits(input_ids)[:, :v]
        combined = torch.full_like(scores, -torch.inf)
        combined[:, :v] = scores[:, :v] + self.alpha * difference.to(scores.device)
        return combined


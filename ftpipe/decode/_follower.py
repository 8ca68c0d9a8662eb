"""A second model that reads what the first one generates: what decoding methods share that compare models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftpipe.decode.base import DecodeRun
from ftpipe.errors import ConfigError

if TYPE_CHECKING:
    import torch


def follower(run: DecodeRun, model: str, adapter: str | None = None) -> Follower:
    """A model as the configuration names it, with the adapter of a folder if one is given, for one batch of prompts. It is loaded once for a service.

    Raises ConfigError if its tokenizer is not that of the model that generates.
    """
    if run.env is None:
        raise ConfigError(f"decoding compares with {model} and was not told where to find it", remedy="pass env= to ModelService.generate")
    other = run.service.companion(model, run.env, adapter=run.env.path(adapter) if adapter else None)
    if other.tokenizer.get_vocab() != run.service.tokenizer.get_vocab():
        raise ConfigError(f"{model} has another tokenizer than the model that generates", remedy="only models that share one can be compared")
    return Follower(other.model, run.attention_mask)


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

"""One-token rollout: at every place, tokens drawn from the model itself, rewarded if they are the one in the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.train.draws import draws
from ftpipe.train.objective.base import Objective
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch


class OneTokenRollout(Objective):
    """-1/n sum_j r(a_j) log p(a_j) at each trained place, over their number: n tokens a_j drawn from the model as it is, r = 1 for the token of the data and
    `penalty` for any other (Ming et al. 2025). It is the policy gradient of a rollout one token long; nothing is generated.

    At temperature 1 and penalty 0 its expectation is the gradient of `dft`; only tokens that the model may draw are learnt. The paper's formula of the reward
    and its defaults were not at hand: they are inferred from its summary (other tokens are penalised) and may differ. `hits` records the share of draws that
    were the data's token, `cross_entropy` the loss to compare runs by. The logits of all trained places of a micro-batch are held at once.
    """

    paper: ClassVar[str] = "One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient"
    formats: ClassVar[tuple[str, ...]] = ("messages", "text", "preference", "unpaired")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.forward",)

    samples: int = Field(default=256, ge=1, description="Tokens drawn at each place, with replacement.")
    temperature: float = Field(default=1.0, gt=0, description="Temperature of the draws; log p is taken at 1.")
    penalty: float = Field(default=-0.1, le=0, description="Reward of a drawn token that is not the data's; 0 ignores it.")

    def loss(self, run: Run, batch: Batch) -> torch.Tensor:
        from ftpipe.train.forward import logits

        found = logits(run.model, batch).float()
        logprobs = found.log_softmax(-1)
        drawn = self.draw(run, batch, found.detach())
        hits = drawn == batch.targets[:, None]
        rewards = hits.to(logprobs.dtype) + self.penalty * ~hits
        own = logprobs.detach().gather(1, batch.targets[:, None])
        for name, value in (("cross_entropy", -own.sum()), ("hits", hits.float().mean(1).sum())):
            run.sums[name] = run.sums.get(name, 0.0) + float(value) * batch.weight
        return -(rewards * logprobs.gather(1, drawn)).sum() / self.samples

    def draw(self, run: Run, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        """Tokens drawn for each place from logits [K, vocabulary]: int64 [K, samples]."""
        import torch

        found = torch.empty(len(logits), self.samples, dtype=torch.int64, device=logits.device)
        for i, (_, _, generator) in enumerate(draws(run, batch, "one_token_rollout")):
            places = batch.sequence == i
            if bool(places.any()):
                found[places] = torch.multinomial((logits[places] / self.temperature).softmax(-1), self.samples, replacement=True, generator=generator)
        return found

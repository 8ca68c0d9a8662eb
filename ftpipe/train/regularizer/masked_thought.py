"""Masked thought: hide some tokens of the answer from the model that is learning to write it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.train.draws import draws
from ftpipe.train.regularizer._hooks import at_rows, on_output, put_back
from ftpipe.train.regularizer.base import Regularizer
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch


class MaskedThought(Regularizer):
    """Each input token of an answer is replaced with probability p, drawn anew at every step; what is to be predicted stays (Chen et al. 2024).

    p climbs in a straight line from 0 at the first step to `share` and stays: min(share, share * step / (warmup * steps + 1)). Prompts are never touched, a
    token is predicted whether its own input was replaced or not, and replaced tokens are attended to. `mask` puts the mean of the embeddings at the start
    of training in their place, which is what the authors' new token starts from; here the vocabulary stays as it is and the mask does not learn. Nothing is
    masked outside of training.
    """

    paper: ClassVar[str] = "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of Language Models"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    share: float = Field(default=0.4, ge=0, le=1, description="Probability of replacement at the end; 0.4 for GSM8K, 0.2 for larger sets.")
    warmup: float = Field(default=0.66, ge=0, le=1, description="Share of all steps in which the probability climbs.")
    replacement: Literal["mask", "random", "pad"] = Field(default="mask", description="What replaces a token: the mean embedding, any token of the vocabulary "
                                                          "at random (it may be the same), or the padding token.")

    def prepare(self, run: Run) -> None:
        import torch

        embedding = run.model.get_input_embeddings()
        vocabulary = embedding.weight.shape[0]
        run.cache["masked_thought/vocabulary"] = vocabulary
        if self.replacement == "mask":
            with torch.no_grad():
                # What the module gives, not its weight: some models scale it.
                parts = [embedding(ids).double().sum(0) for ids in torch.arange(vocabulary, device=run.device).split(4096)]
            run.cache["masked_thought/mean"] = (torch.stack(parts).sum(0) / vocabulary).float()
        if self.replacement == "pad":
            run.cache["masked_thought/pad"] = run.load_tokenizer().pad_token_id
            if run.cache["masked_thought/pad"] is None:
                raise ConfigError("the tokenizer has no padding token to mask with", remedy="set replacement to mask or random")

    def probability(self, run: Run) -> float:
        """Probability of replacement at the run's step."""
        return min(self.share, self.share * run.step / (self.warmup * run.steps + 1))

    def inputs(self, run: Run, batch: Batch) -> Batch:
        import torch

        share = run.metrics["masked_share"] = self.probability(run)
        answer = torch.zeros(batch.tokens, dtype=torch.bool, device=batch.input_ids.device)
        answer[batch.sources + 1] = True
        ids, hidden = batch.input_ids.clone(), torch.zeros_like(answer)
        for start, end, generator in draws(run, batch, "masked_thought"):
            drawn = torch.rand(end - start, generator=generator, device=ids.device) < share
            hidden[start:end] = drawn & answer[start:end]
            if self.replacement == "random":
                others = torch.randint(run.cache["masked_thought/vocabulary"], (end - start,), generator=generator, device=ids.device)
                ids[0, start:end] = torch.where(hidden[start:end], others, ids[0, start:end])
        if self.replacement == "pad":
            ids[0, hidden] = run.cache["masked_thought/pad"]
        return replace(batch, input_ids=ids, extra=batch.extra | {"masked_thought": hidden})

    @contextmanager
    def forward(self, run: Run, batch: Batch) -> Iterator[None]:
        if self.replacement != "mask":
            yield
            return
        hidden, mean = batch.extra["masked_thought"], run.cache["masked_thought/mean"]

        def mask(embedded: torch.Tensor) -> torch.Tensor:
            if embedded.shape[1] < batch.tokens:
                return embedded
            rows = at_rows(embedded, batch)
            return put_back(embedded, batch, rows.where(~hidden[:, None], mean.to(rows.dtype)))

        with on_output(run.model.get_input_embeddings(), mask):
            yield

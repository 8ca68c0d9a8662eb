"""NEFTune (Jain et al. 2023): uniform noise on the embeddings of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.train.draws import draws
from ftpipe.train.regularizer._hooks import at_rows, on_output, put_back
from ftpipe.train.regularizer.base import Regularizer
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch


class Neftune(Regularizer):
    """Adds to each element of a token's embedding a number from [-1, 1] times alpha / sqrt(L d), L the tokens of its sequence (prompt and answer), d the width.

    L is the length of the row itself, whatever it is packed with. Passes in evaluation mode (a reference) and everything outside of training are without noise.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    alpha: float = Field(default=5.0, ge=0, description="Size of the noise; the paper uses 5, 10 and 15.")

    @contextmanager
    def forward(self, run: Run, batch: Batch) -> Iterator[None]:
        import torch

        embedding = run.model.get_input_embeddings()

        def disturb(embedded: torch.Tensor) -> torch.Tensor:
            if not embedding.training or embedded.shape[1] < batch.tokens:
                return embedded
            rows, parts = at_rows(embedded, batch), []
            for start, end, generator in draws(run, batch, "neftune"):
                noise = torch.rand(end - start, rows.shape[1], generator=generator, device=rows.device) * 2 - 1
                parts.append(noise * (self.alpha / (noise.numel() ** 0.5)))
            return put_back(embedded, batch, rows + torch.cat(parts).to(rows.dtype))

        with on_output(embedding, disturb):
            yield

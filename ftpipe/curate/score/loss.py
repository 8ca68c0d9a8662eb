"""Loss of each row under a model, and its embedding, from one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.curate.score.base import Scorer
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import pyarrow as pa


class Loss(Scorer):
    """Annotates `loss` (mean over the trained tokens, nats), `nll` (their sum) and `trained_tokens`; with `embedding`, also the embedding.

    Trained tokens are those of the answers given the conversation before them; of plain text, all but the first. The embedding is the mean of the last hidden
    states over all tokens of the row, not normalised. A row without a trained token, or one that cannot be rendered, gets nulls.
    """

    uses_model: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "peft")

    adapter: Ref | None = Field(default=None, description="Stage whose adapter is put on the model; the model as it is by default.")
    embedding: bool = Field(default=False, description="Also store each row's embedding; it comes from the same pass.")

    def annotate(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        from ftpipe.models.scores import score_rows

        adapter = ctx.inputs[self.adapter] if self.adapter else None
        if adapter is not None and not adapter.has("adapter"):
            raise ConfigError(f"adapter: {self.adapter} is a {adapter.kind} stage, which makes no adapter", where=ctx.name, remedy="name a train stage")
        table = score_rows(rows, ctx, model=ctx.model, want=("loss", "embedding") if self.embedding else ("loss",), adapter=adapter)
        return table.select(["row_id", "loss", "nll", "trained_tokens", *(["embedding"] if self.embedding else [])])

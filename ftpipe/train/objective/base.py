"""The base of objectives: what is minimised.

A row becomes one or more *sequences* (`encode`), rows become a micro-batch (`collate`), a micro-batch has a loss that is a *sum* (`loss`) and a
count (`Batch.count`). The loop divides the sum over a whole optimizer step, all its micro-batches and all ranks, by the count over the same, so
that neither accumulation nor the number of ranks changes what is minimised.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch

    from ftpipe.data.render import Renderer
    from ftpipe.errors import DataError


@dataclass(frozen=True)
class Example:
    """One row as tokens: for each of its sequences the token ids, and for each token whether it is a target (the first never is)."""

    row_id: str
    input_ids: tuple[Sequence[int], ...]
    trained: tuple[Sequence[bool], ...]

    @property
    def tokens(self) -> int:
        """Tokens in all sequences of the row."""
        return sum(len(ids) for ids in self.input_ids)

    @property
    def targets(self) -> int:
        """Trained tokens in all sequences of the row."""
        return sum(sum(mask[1:]) for mask in self.trained)


class Objective(Method):
    """The loss of a micro-batch, given the model and whatever else it needs.

    Class attributes:
        formats: formats of rows it trains on (see `data.rows.rows_schema`).
        sequences: how many sequences one row becomes.
        unit: what `Batch.count` counts; shown in logs.
        side_by_side: whether `loss` may be called for several micro-batches at the same time: it draws no random numbers, does not switch the
            model's adapter or mode, and writes to nothing but its batch and `run.sums`. It is said by the class that defines `loss`.
    """

    slot: ClassVar[str] = "train/objective"
    formats: ClassVar[tuple[str, ...]] = ("messages", "text")
    sequences: ClassVar[int] = 1
    unit: ClassVar[str] = "tokens"
    side_by_side: ClassVar[bool] = False

    def encode(self, rows: Iterable[dict[str, Any]], renderer: Renderer) -> Iterator[Example | DataError]:
        """Each row as an `Example`, or the error that says why it cannot be one. One sequence per row, rendered for training, by default."""
        from ftpipe.errors import DataError

        rows = list(rows)
        for row, rendered in zip(rows, renderer.rows(rows), strict=True):
            yield rendered if isinstance(rendered, DataError) else Example(row["row_id"], (rendered.input_ids,), (rendered.trained,))

    def prepare(self, run: Run) -> None:
        """Called once before the first step: load a reference or a teacher (`run.load_base()`) and keep it in `run.cache`."""

    def count(self, examples: Sequence[Example]) -> float:
        """What the loss of these rows is divided by: their trained tokens by default."""
        return float(sum(e.targets for e in examples))

    def collate(self, run: Run, examples: Sequence[Example]) -> Batch:
        """One micro-batch of these rows, laid end to end. May generate with the model; then every rank does so at the same time."""
        from ftpipe.train.batches import lay_out

        return lay_out(examples, self.count(examples), run.device)

    def before_step(self, run: Run, batches: Sequence[Batch]) -> None:
        """Called with all micro-batches of this rank before the first is trained on, on every rank at the same time: the place for what depends on the
        whole step, not on the micro-batch (`run.engine.look` runs the model without a gradient; copies of weight 0 do not count)."""

    @abstractmethod
    def loss(self, run: Run, batch: Batch) -> torch.Tensor:
        """The *sum* of the loss over the batch: a scalar with a gradient. Forward passes go through `train.forward`."""

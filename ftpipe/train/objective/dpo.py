"""Direct Preference Optimization: raise the chosen answer above the rejected one, measured against a reference.

-log sigmoid(beta * ((log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r)))), log p the sum over the answer's tokens
(Rafailov et al. 2023, equation 7).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import DataError
from ftpipe.train.objective._reference import keep_reference, reference
from ftpipe.train.objective._sequences import totals
from ftpipe.train.objective.base import Example, Objective
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch

    from ftpipe.data.render import Renderer


class Dpo(Objective):
    """Preference pairs. The reference is the base model: the same model with its adapter off where the method allows that, else a second copy."""

    formats: ClassVar[tuple[str, ...]] = ("preference",)
    sequences: ClassVar[int] = 2
    unit: ClassVar[str] = "pairs"
    needs: ClassVar[tuple[str, ...]] = ("preference rows",)
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.forward",)

    beta: float = Field(default=0.1, gt=0, description="How strongly a gain over the reference counts; small values let the model move far from it.")

    def encode(self, rows: Iterable[dict[str, Any]], renderer: Renderer) -> Iterator[Example | DataError]:
        for row in rows:
            try:
                chosen, rejected = renderer.preference(row["messages"], row["chosen"], row["rejected"])
            except DataError as error:
                yield error
                continue
            if not (chosen.trained_tokens and rejected.trained_tokens):
                yield DataError("one of the two answers has no trained token")
                continue
            yield Example(row["row_id"], (chosen.input_ids, rejected.input_ids), (chosen.trained, rejected.trained))

    def count(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    def prepare(self, run: Run) -> None:
        keep_reference(run)

    def loss(self, run: Run, batch: Batch) -> torch.Tensor:
        from torch.nn.functional import logsigmoid

        from ftpipe.train.forward import token_losses

        def answers(model: Any) -> torch.Tensor:
            """Log probability of each answer: [2 pairs]."""
            return totals(-token_losses(model, batch), batch, 2 * int(batch.count))

        with reference(run) as model:
            before = answers(model)
        gain = answers(run.model) - before
        chosen, rejected = gain[0::2], gain[1::2]
        for name, value in (("margin", self.beta * (chosen - rejected).detach().sum()), ("pairs_right", (chosen > rejected).sum())):
            run.sums[name] = run.sums.get(name, 0.0) + float(value) * batch.weight
        return -logsigmoid(self.beta * (chosen - rejected)).sum()

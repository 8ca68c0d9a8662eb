"""Kahneman-Tversky Optimization: learn from answers that were each called good or bad, without pairs.

With r = log p(y|x) - log p_ref(y|x), a sum over the answer's tokens, and z = max(0, an estimate of KL(p || p_ref)), the loss of an answer is
good_weight (1 - sigmoid(beta (r - z))) if it was called good and bad_weight (1 - sigmoid(beta (z - r))) if it was called bad
(Ethayarajh et al. 2024, equation 8 and section 4.1).
"""

from __future__ import annotations

import math
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

    from ftpipe.data.render import Rendered, Renderer

OTHERS, GOOD = "kto others", "kto good"


class Kto(Objective):
    """Judged answers (rows with `label`). The reference is the base model, as in `dpo`.

    z is the mean of r over answers that belong to other prompts: each row's prompt is followed by the answer of the next row in the file whose prompt is
    another. The authors pair within a micro-batch; here the pairs are made once, and z is the mean over the rows of the whole step, on all ranks, found before
    the step without a gradient, so that neither micro-batches nor ranks change it. Of that answer the first trained stretch is taken.

    A row is two sequences, first a good answer, then a bad one; the one of the two that it has not is the other row's answer, in which nothing is trained.
    `kl` records z, `right` the share of answers on their side of it. The paper keeps good_weight x good rows to bad_weight x bad rows between 1 and 4/3.
    """

    formats: ClassVar[tuple[str, ...]] = ("unpaired",)
    sequences: ClassVar[int] = 2
    unit: ClassVar[str] = "answers"
    needs: ClassVar[tuple[str, ...]] = ("rows with `label`",)
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.forward",)

    beta: float = Field(default=0.1, gt=0, description="How strongly a gain over the reference counts; small values let the model move far from it.")
    good_weight: float = Field(default=1.0, ge=0, description="Weight of answers called good.")
    bad_weight: float = Field(default=1.0, ge=0, description="Weight of answers called bad.")

    def encode(self, rows: Iterable[dict[str, Any]], renderer: Renderer) -> Iterator[Example | DataError]:
        from ftpipe.data.render import judged

        rows = list(rows)
        shown = list(renderer.rows(judged(row) for row in rows))
        usable = [i for i, r in enumerate(shown) if not isinstance(r, DataError) and r.trained_tokens]
        prompts = [shown[i].input_ids[:shown[i].prompt_length] for i in usable]
        other_of = {i: (prompt, other) for i, prompt, other in zip(usable, prompts, next_others(prompts), strict=True)}
        for i, (row, own) in enumerate(zip(rows, shown, strict=True)):
            if isinstance(own, DataError) or i not in other_of:
                yield own if isinstance(own, DataError) else DataError("nothing in it is trained on")
                continue
            prompt, other = other_of[i]
            if other is None:
                yield DataError("no row has another prompt, and kto needs one to measure how far the model has moved")
                continue
            mixed = [*prompt, *answer(shown[usable[other]])]
            both = ((own.input_ids, own.trained), (mixed, [False] * len(mixed)))
            ids, trained = zip(*(both if row["chosen"] else both[::-1]))
            yield Example(row["row_id"], ids, trained)

    def count(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    def collate(self, run: Run, examples: Sequence[Example]) -> Batch:
        import torch

        from ftpipe.train.batches import lay_out

        own, others, good = [], [], []
        for e in examples:
            good.append(any(e.trained[0]))
            mine, its = (0, 1) if good[-1] else (1, 0)
            start = list(e.trained[mine]).index(True)
            own.append(Example(e.row_id, (e.input_ids[mine],), (e.trained[mine],)))
            others.append(Example(e.row_id, (e.input_ids[its],), ([place >= start for place in range(len(e.input_ids[its]))],)))
        batch = lay_out(own, self.count(examples), run.device)
        batch.extra |= {OTHERS: lay_out(others, batch.count, run.device), GOOD: torch.tensor(good, device=run.device)}
        return batch

    def prepare(self, run: Run) -> None:
        keep_reference(run)

    def before_step(self, run: Run, batches: Sequence[Batch]) -> None:
        found = [run.engine.look(batch, lambda run, batch: gains(run, batch.extra[OTHERS])) for batch in batches]
        each = run.gather([v for batch, part in zip(batches, found, strict=True) if batch.weight for v in part.tolist()])
        run.cache["kto z"] = run.metrics["kl"] = max(0.0, math.fsum(each) / len(each))

    def loss(self, run: Run, batch: Batch) -> torch.Tensor:
        import torch

        gain, good = gains(run, batch), batch.extra[GOOD]
        above = gain - run.cache["kto z"]
        run.sums["right"] = run.sums.get("right", 0.0) + float(((above > 0) == good).sum()) * batch.weight
        weights = torch.where(good, self.good_weight, self.bad_weight)
        return (weights * torch.sigmoid(-self.beta * torch.where(good, above, -above))).sum()


def next_others(values: Sequence[Any]) -> list[int | None]:
    """For each place the next one, going round, that holds another value; None where all are the same."""
    n = len(values)
    found: list[int | None] = [None] * n
    for place in range(2 * n - 1, -1, -1):  # twice, so that the last places know what comes after the first
        here, after = place % n, (place + 1) % n
        found[here] = after if values[here] != values[after] else found[after]
    return found


def answer(rendered: Rendered) -> list[int]:
    """The tokens of the first trained stretch."""
    end = next((i for i in range(rendered.prompt_length, len(rendered.trained)) if not rendered.trained[i]), len(rendered.trained))
    return rendered.input_ids[rendered.prompt_length:end]


def gains(run: Run, batch: Batch) -> torch.Tensor:
    """log p - log p_ref of the trained tokens of each sequence: [sequences]."""
    from ftpipe.train.forward import token_losses

    sequences = len(batch.row_ids)
    with reference(run) as model:
        before = totals(-token_losses(model, batch), batch, sequences)
    return totals(-token_losses(run.model, batch), batch, sequences) - before

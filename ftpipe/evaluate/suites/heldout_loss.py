"""Loss of the answers in the held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ftpipe.data.rows import HELDOUT
from ftpipe.errors import DataError
from ftpipe.evaluate.suites.base import Given, Item, Score, Suite

if TYPE_CHECKING:
    from ftpipe.evaluate.systems import System

METRIC = "loss"


class HeldoutLoss(Suite):
    """Mean negative log-likelihood of a trained token, in nats, on rows that training never saw.

    An item is a held-out row; its score is the row's mean over its trained tokens (`-1/n sum ln p`), its weight their number n, so that the
    mean over items is the loss of a token, not of a row. Its slice is the row's group. Of a preference row the chosen answer counts.
    """

    limit: int = Field(default=0, ge=0, description="Use only so many held-out rows, the first in their order; 0 uses all.")

    def items(self, given: Given) -> list[Item]:
        table = given.rows.table(HELDOUT, ["row_id", "content_id", "format", "messages", "chosen", "rejected", "text", "group", "source"])
        rows = (table.slice(0, self.limit) if self.limit else table).to_pylist()
        if not rows:
            raise DataError(f"{given.rows.artifact.name} has no held-out rows", where="evaluate",
                            remedy="set `heldout` in the ingest stage, and name a rows stage that passes them on")
        suite, = self.labels()
        return [Item(id=r["row_id"], content=r["content_id"], slice=r["group"], suite=suite, ask=r, source=r["source"] or "") for r in rows]

    def measure(self, system: System, items: Sequence[Item]) -> Iterator[tuple[Item, list[Score]]]:
        yield from token_losses(system, items, [i.ask for i in items])


def token_losses(system: System, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Item, list[Score]]]:
    """The loss of each row's trained tokens. What cannot be rendered, or has no trained token, yields no score."""
    size = CHUNK if not items or system.service.batch_tokens else ALONE
    for start in range(0, len(items), size):
        part = items[start:start + size]
        rendered = [None if isinstance(r, Exception) or not r.input_ids else r for r in system.service.renderer.rows(rows[start:start + size])]
        scores = iter(system.service.score([r for r in rendered if r is not None]))
        for item, shown in zip(part, rendered):
            score = next(scores) if shown is not None else None
            known = score is not None and score.loss is not None
            yield item, [Score(METRIC, score.loss, float(score.trained_tokens), higher_is_better=False)] if known else []


CHUNK, ALONE = 256, 4
"""Rows that go to the service together, where it batches and where it does not; after each chunk results are saved and progress is told."""

"""Tulu's mixtures: parts put together whole, or cut to a stated size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ftpipe.curate.mix._sources import SourceMixer, Sources
from ftpipe.curate.step import StepContext
from ftpipe.errors import DataError, nearest

if TYPE_CHECKING:
    import numpy as np


class Tulu(SourceMixer):
    """Puts sources together: each part whole, or exactly as many of its rows as stated; sources that are no part are left out.

    There are no mixture weights: shares follow from sizes, and what trains is tokens, so a source of long rows has a far larger share of them than of the
    rows. The report lists both. The paper's human mixture is Flan V2 (100,000 rows), CoT (50,000 zero-shot and 50,000 few-shot), Dolly and Open Assistant 1
    whole; its mixture of human and model-written data adds ShareGPT, GPT4-Alpaca and Code-Alpaca whole. One part alone is the paper's comparison of single
    data sets.

    The mixture is what this method is. The rest of the recipe are settings of other stages: the chat format belongs to the tokenizer, rows without a trained
    token are dropped by the label audit, training is two epochs at 2e-5 with batches of 128. The paper's code also trains the line feed between an answer's
    end-of-turn token and the next turn; ftpipe trains answers and their end-of-turn tokens and nothing after them.
    """

    paper: ClassVar[str] = "How Far Can Camels Go? Exploring the State of Instruction Tuning on Open Resources"
    reason: ClassVar[str] = "not in the mixture"

    parts: dict[str, Annotated[int, Field(ge=1)] | None] = Field(
        default_factory=dict, description="What of each source is in the mixture: an amount in `unit` that it must hold, null for all; by default all of all.")

    def wanted(self, sources: Sources, ctx: StepContext) -> np.ndarray:
        import numpy as np

        where = f"{ctx.name} (tulu.parts)"
        for name, amount in self.parts.items():
            if name not in sources.names:
                raise DataError(f"there is no source {name!r}", where=where, remedy=nearest(name, sources.names))
            held = int(sources.size[sources.names.index(name)])
            if amount is not None and amount > held:
                raise DataError(f"source {name!r} holds {held:,} {self.unit}, {amount:,} are stated", where=where, remedy="write null to take all there is")
        given = [self.parts.get(name, 0) if self.parts else None for name in sources.names]
        return np.array([held if part is None else part for part, held in zip(given, sources.size.tolist())], dtype=np.int64)

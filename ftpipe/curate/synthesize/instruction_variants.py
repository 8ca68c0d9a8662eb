"""The same tasks, asked in other words from a list of templates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator

from ftpipe.curate.draw import uniforms
from ftpipe.curate.step import StepContext
from ftpipe.curate.synthesize.base import Synthesizer
from ftpipe.data.rows import RowSet

PROMPT = "{prompt}"


class InstructionVariants(Synthesizer):
    """Makes copies of conversations whose first question is put into a template, so that the model does not hang on one wording.

    Which templates a row gets is drawn from the seed and the row's id, without repetition. Rows without a user's turn (plain text) get none.
    """

    uses_seed = True

    templates: list[str] = Field(min_length=1, description="Wordings, each with {prompt} where the row's own question goes.")
    per_row: int = Field(default=1, ge=1, description="Variants of each row, at most as many as there are templates.")

    @field_validator("templates")
    @classmethod
    def _slots(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count(PROMPT) != 1:
                raise ValueError(f"{PROMPT} must stand once in each template, not so in {template!r}")
        if len(set(value)) < len(value):
            raise ValueError("a template is listed twice")
        return value

    def make(self, rows: RowSet, ctx: StepContext) -> Iterator[dict[str, Any]]:
        import numpy as np

        table = rows.table(columns=["row_id", "format", "messages", "chosen", "rejected"]).sort_by("row_id")
        draws = np.stack([uniforms(table["row_id"], ctx.seed, self.name(), i) for i in range(len(self.templates))], axis=1)
        picks = np.argsort(draws, axis=1, kind="stable")[:, :self.per_row]
        at = 0
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                pick, at = picks[at], at + 1
                turns = row["messages"] or []
                first = next((i for i, t in enumerate(turns) if t["role"] == "user"), None)
                if first is None:
                    continue
                for i in pick.tolist():
                    said = self.templates[i].replace(PROMPT, turns[first]["content"])
                    messages = [{**t, "content": said} if k == first else t for k, t in enumerate(turns)]
                    yield {"format": row["format"], "messages": messages, "chosen": row["chosen"], "rejected": row["rejected"],
                           "parents": [row["row_id"]], "meta": {"template": self.templates[i]}}

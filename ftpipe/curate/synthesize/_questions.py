"""Rows that a model can answer again: the conversation before the last answer, and that answer."""

from __future__ import annotations

from dataclasses import dataclass

from ftpipe.data.rows import RowSet

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A train row that ends with an answer. asked: the turns before it. gold: the answer."""

    row_id: str
    asked: list[Message]
    gold: str

    def answered(self, text: str) -> list[Message]:
        """The conversation with another answer at its end."""
        return [*self.asked, {"role": "assistant", "content": text}]


def questions(rows: RowSet) -> list[Question]:
    """The conversations among the train rows that end with an answer to something, ascending by row_id."""
    found = []
    for row in rows.table(columns=["row_id", "format", "messages"]).sort_by("row_id").to_pylist():
        turns = row["messages"] or []
        if row["format"] == "messages" and len(turns) > 1 and turns[-1]["role"] == "assistant":
            found.append(Question(row["row_id"], turns[:-1], turns[-1]["content"] or ""))
    return found

"""Generated answers, each checked against a reference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ftpipe.canonical import digest
from ftpipe.data.formats import FormatError, check_fields, convert
from ftpipe.data.forms import exchange
from ftpipe.data.rows import HELDOUT
from ftpipe.data.wording import fill
from ftpipe.errors import DataError
from ftpipe.evaluate.checkers.base import Ask, Case, Message
from ftpipe.evaluate.checkers.exact import Exact
from ftpipe.evaluate.suites.base import Given, Item, Score, Suite
from ftpipe.models.loading import identity
from ftpipe.slots import Pattern, choose
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from ftpipe.evaluate.systems import System


class Generation(Suite):
    """Share of answers that a checker accepts: 0 or 1 for an item, or the share of its samples where several are drawn.

    An item is a question with its last answer as reference: of a held-out row, or of a row of `source`, in any format that `ingest` reads (GSM8K's
    question and answer with the checker `final_number`, tool calls with `json`). For a checker without a reference (`refusal`) a row of the source may also
    be a bare question, {"text": ...}. Decoding is greedy unless `temperature` says otherwise. The metric carries the checker's name. The stage keeps answers
    by model, question and settings of generation, so that another checker asks no model again. A question that leaves no room for `max_new_tokens` in
    the model's context has no score.

    A checker that asks a model asks `judge_model`, loaded beside the system and the same for all of them.
    """

    support: ClassVar[tuple[str, ...]] = ("ftpipe.models.answers",)

    source: choose("data/sources") | None = Field(default=None, description="Where the questions come from; the held-out rows by default.")  # type: ignore[valid-type]
    fields: dict[str, str] = Field(default={}, description="The source's own names for a format's fields: {prompt: q, completion: a}.")
    group_by: str = Field(default="", description="Field of the source's rows that names an item's slice.")
    limit: int = Field(default=0, ge=0, description="Use only so many items, the first; 0 uses all.")
    reference_like: Pattern = Field(default="", description="Regular expression: the last answer of a row that it finds is asked for, such as a tool call; "
                                    "rows without one are left out. By default the last answer.")
    checker: choose("evaluate/checkers") = Field(default=Exact(), description="What decides whether an answer is right.")  # type: ignore[valid-type]
    judge_model: str = Field(default="", description="Model that a checker such as `judge` asks.")
    prompt: str = Field(default="{question}", description="What is asked; {question} is the last turn before the answer.")
    stop: list[str] = Field(default=[], description="Texts at the first of which an answer is cut off before it is checked.")
    max_new_tokens: int = Field(default=256, ge=1, le=32_768, description="Longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy decoding.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus that is sampled from, with a temperature.")
    samples: int = Field(default=1, ge=1, description="Answers to each question, with a temperature.")
    seed: int = Field(default=0, ge=0, description="Seed of the sampling.")

    @model_validator(mode="after")
    def _whole(self) -> Generation:
        if "{question}" not in self.prompt:
            raise ValueError("`prompt` has to hold the {question}")
        if self.samples > 1 and not self.temperature:
            raise ValueError("greedy samples are all the same; set a `temperature`")
        if type(self.checker).asks != bool(self.judge_model):
            raise ValueError(f"the checker {self.checker.name()} {'needs a' if type(self.checker).asks else 'asks no'} `judge_model`")
        if self.source is None and (self.fields or self.group_by):
            raise ValueError("`fields` and `group_by` are for a `source`; held-out rows have been read already")
        check_fields(self.fields, "auto")
        return self

    def externals(self, env: Environment) -> dict[str, Any]:
        return ({"source": self.source.identity(env)} if self.source else {}) | ({"judge": identity(self.judge_model, env)} if self.judge_model else {})

    def items(self, given: Given) -> list[Item]:
        suite, = self.labels()
        judge = identity(self.judge_model, given.env) if self.judge_model else None
        found = []
        for name, group, turns, reference in self._questions(given):
            for told, part, asked in self._askings(turns):
                content = digest([[[t["role"], t["content"]] for t in asked], reference, judge])
                found.append(Item(id=f"{name}{told}", content=content, slice=part or group, suite=suite, ask=(asked, turns, reference, given.env)))
        return found

    def _askings(self, turns: Sequence[Message]) -> Iterator[tuple[str, str, list[Message]]]:
        """(what follows in the item's id, slice if not the question's own, conversation) of each way in which a question is asked."""
        yield "", "", reworded(turns, self.prompt)

    def _questions(self, given: Given) -> list[tuple[str, str, list[Message], str]]:
        """(name, slice, turns up to the question, reference) of the first `limit` rows that have them."""
        found = []
        for name, group, row in rows_of_source(self.source, self.fields, self.group_by, given) if self.source else heldout_rows(given):
            said = exchange(row if not self.reference_like else up_to(row, self.reference_like))
            if said is None and not type(self.checker).needs_reference and row.get("text"):
                said = [{"role": "user", "content": row["text"]}], ""
            if said is not None:
                found.append((name, group, *said))
            if len(found) == self.limit:
                break
        if not found:
            where = "the source" if self.source else given.rows.artifact.name
            raise DataError(f"{where} has no question with an answer", where=self.labels()[0],
                            remedy="give rows with a question and its answer; with `heldout` in the ingest stage, or a `source` here")
        return found

    def measure(self, system: System, items: Sequence[Item]) -> Iterator[tuple[Item, list[Score]]]:
        asking = self._judge(system, items) if self.judge_model else None
        for i, answers in system.answers([item.ask[0] for item in items], max_new_tokens=self.max_new_tokens, samples=self.samples,
                                         temperature=self.temperature, top_p=self.top_p, seed=self.seed):
            _, turns, reference, _ = items[i].ask
            cases = [Case(turns, cut(a.text, self.stop), reference) for a in answers if a.problem is None]
            right = self.checker.check(cases, asking) if cases else []
            yield items[i], [Score(self.checker.name(), sum(right) / len(right))] if right else []

    def _judge(self, system: System, items: Sequence[Item]) -> Ask:
        service = system.service.companion(self.judge_model, items[0].ask[3])

        def ask(conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
            return [g.text for g in service.generate([service.renderer.prompt(c) for c in conversations], max_new_tokens=max_new_tokens, batch_size=1)]

        return ask


def up_to(row: dict[str, Any], pattern: str) -> dict[str, Any]:
    """A row's turns up to the last answer in which the pattern is found; no turns without one."""
    turns = [*(row.get("messages") or []), *(row.get("chosen") or [])]
    ends = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and re.search(pattern, turn["content"] or "", re.DOTALL)]
    return {"messages": turns[: ends[-1] + 1] if ends else []}


def reworded(turns: Sequence[Message], wording: str) -> list[Message]:
    """`turns` with the last one's text put into a wording."""
    return [*turns[:-1], dict(turns[-1], content=fill(wording, {"question": turns[-1]["content"] or ""}))]


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops` in it."""
    return text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))]


def heldout_rows(given: Given) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(row_id, group, row) of each held-out row."""
    for row in given.rows.table(HELDOUT, ["row_id", "messages", "chosen", "group"]).to_pylist():
        yield row["row_id"], row["group"], row


def rows_of_source(source: Any, fields: dict[str, str], group_by: str, given: Given) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(origin, slice, row) of each record of a source. Raises DataError for one that cannot be read: a test must not lose items silently."""
    for record in source.records(given.env):
        where = f"{record.source}:{record.line}"
        if record.error is not None:
            raise DataError(f"{record.error} {record.detail}".strip(), where=where, remedy="mend the file of questions")
        try:
            row = convert(record.raw, "auto", fields)
        except FormatError as error:
            raise DataError(error.what, where=where, remedy="mend the row, or set `fields`") from error
        yield where, str(record.raw.get(group_by, "")) if group_by else record.group or "", row

"""Other forms in which a row can be put before a model, for scores that are not those of training.

A form renders rows as `Renderer.rows` does. `score_rows(form=...)` keeps the scores of each form in a cache of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftpipe.data.render import Message, Rendered, Renderer, RenderError
from ftpipe.data.rows import TOOLS
from ftpipe.errors import ConfigError

PROMPT, ANSWER = "{prompt}", "{answer}"


class Form(ABC):
    """How rows become tokens. A subclass is a frozen dataclass; its name and fields tell its scores from those of other forms."""

    def key(self) -> dict[str, Any]:
        return {type(self).__name__: asdict(self)}

    @abstractmethod
    def rows(self, renderer: Renderer, rows: Iterable[dict[str, Any]]) -> Iterator[Rendered | RenderError]:
        """One result per row of `rows_schema()`, in order; an error for a row that has no such form."""


@dataclass(frozen=True)
class AnswerAlone(Form):
    """The very tokens that training would have a loss of, one answer after the other, without anything of what they answer.

    One token stands before them, BOS or, for a tokenizer without one, EOS, so that the first token of the answer has a loss here too.
    """

    def rows(self, renderer: Renderer, rows: Iterable[dict[str, Any]]) -> Iterator[Rendered | RenderError]:
        start = renderer.bos if renderer.bos is not None else renderer.eos
        if start is None:
            raise ConfigError("the tokenizer has neither BOS nor EOS, so nothing can stand before an answer without its prompt",
                              where=str(renderer.tokenizer.name_or_path), remedy="set `bos_token` in its tokenizer_config.json")
        given = list(rows)
        for row, shown in zip(given, renderer.rows(given)):
            if isinstance(shown, RenderError):
                yield shown
            elif row["format"] == "text":
                yield RenderError("plain text has no prompt")
            else:
                answer = [t for t, on in zip(shown.input_ids, shown.trained) if on]
                yield Rendered([start, *answer], [False, *[True] * len(answer)], 1)


@dataclass(frozen=True)
class Template(Form):
    """A row's last answer behind its prompt in plain text, `Question: {prompt}\\nAnswer: {answer}`, for models that know no chat template.

    Only the answer's tokens have a loss; no end token is appended, so none is counted. Prompt and answer are tokenised apart, the blanks before the answer with
    the answer, as tokenizers join them to a word. See `exchange` and `said` for what prompt and answer are.
    """

    template: str

    def rows(self, renderer: Renderer, rows: Iterable[dict[str, Any]]) -> Iterator[Rendered | RenderError]:
        before = self.template.removesuffix(ANSWER)
        blanks = before[len(before.rstrip(" ")):]
        found = [exchange(row) for row in rows]
        pairs = [(before.rstrip(" ").replace(PROMPT, said(f[0])), blanks + f[1]) for f in found if f is not None]
        shown = iter(renderer.continued(pairs))
        for f in found:
            yield RenderError("no prompt with an answer") if f is None else next(shown)


def exchange(row: dict[str, Any]) -> tuple[list[Message], str] | None:
    """The turns before a row's last answer, and that answer; None for plain text, and where no answer follows a turn. Of a pair the chosen answer counts."""
    turns = [*(row.get("messages") or []), *(row.get("chosen") or [])]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    return (turns[:last], turns[last]["content"] or "") if last else None


def said(turns: Sequence[Message]) -> str:
    """Turns as plain text, separated by line feeds; their roles are written before them only where the assistant has spoken among them. Tool definitions are
    not among what was said."""
    turns = [turn for turn in turns if turn["role"] != TOOLS]
    roles = any(turn["role"] == "assistant" for turn in turns)
    return "\n".join(f"{turn['role']}: {turn['content'] or ''}" if roles else turn["content"] or "" for turn in turns)


@dataclass(frozen=True)
class PromptAlone(Form):
    """What stands before a row's first answer, as training shows it; plain text whole. No token has a loss."""

    def rows(self, renderer: Renderer, rows: Iterable[dict[str, Any]]) -> Iterator[Rendered | RenderError]:
        given = list(rows)
        for row, shown in zip(given, renderer.rows(given)):
            if isinstance(shown, RenderError):
                yield shown
            else:
                length = len(shown.input_ids) if row["format"] == "text" else shown.prompt_length
                yield Rendered(shown.input_ids[:length], [False] * length, length)

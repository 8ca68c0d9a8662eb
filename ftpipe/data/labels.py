"""What is trained on: checks of one rendered row against the tokenizer's conventions and the context limit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ftpipe.data.render import BATCH, Rendered, Renderer, RenderError, judged, tools_of


@dataclass(frozen=True)
class Labelled:
    """The verdict on a row. reason: why it cannot be trained on, None if it can. The counts are after truncation, None if it could not be rendered."""

    row: dict[str, Any]
    reason: str | None
    rendered: Rendered | None = None
    prompt_tokens: int | None = None
    trained_tokens: int | None = None
    tokens: int | None = None


class LabelChecks:
    """Checks rows for one tokenizer.

    Args:
        renderer: how rows become tokens.
        max_tokens: the context in tokens; what of a row lies beyond it is not seen.
        truncate: accept rows whose answer is cut at the limit (they teach no end of turn).
        require_bos: a rendering must begin with BOS if the tokenizer puts one in front of plain text.
    """

    def __init__(self, renderer: Renderer, max_tokens: int, *, truncate: bool = False, require_bos: bool = True):
        self.renderer, self.max_tokens, self.truncate, self.require_bos = renderer, max_tokens, truncate, require_bos
        names = renderer.tokenizer.convert_ids_to_tokens(sorted(renderer.special_ids))
        self.control = re.compile("|".join(re.escape(t) for t in sorted(names, key=len, reverse=True)) or r"(?!)")

    def rows(self, rows: Iterable[dict[str, Any]]) -> Iterator[Labelled]:
        """One verdict per row of `rows_schema()`, in order."""
        source = iter(rows)
        while batch := [judged(row) for row in islice(source, BATCH)]:
            rendered = list(self.renderer.rows(batch))
            others = iter(list(self.renderer.rows({**r, "chosen": r["rejected"]} for r in batch if r.get("rejected") is not None)))
            inference = self._inference(batch, rendered)
            for row, result, prompt in zip(batch, rendered, inference):
                other = next(others) if row.get("rejected") is not None else None
                yield self._verdict(row, result, prompt, other)

    def _inference(self, batch: list[dict[str, Any]], rendered: list[Rendered | RenderError]) -> list[list[int] | None]:
        """The tokens the model is started from at inference, as the tokenizer's own `apply_chat_template` gives them, for the first trained turn."""
        prompts: list[list[int] | None] = [None] * len(batch)
        at = [i for i, (row, r) in enumerate(zip(batch, rendered)) if isinstance(r, Rendered) and row["format"] != "text"]
        heads = {i: tools_of(_head(batch[i])) for i in at}
        together = [i for i in at if heads[i][0] is None]
        for some in filter(None, (together, *([i] for i in at if heads[i][0] is not None))):
            found = self.renderer.tokenizer.apply_chat_template([list(heads[i][1]) for i in some], tools=heads[some[0]][0], tokenize=True,
                                                                add_generation_prompt=True, return_dict=True)["input_ids"]
            for i, ids in zip(some, found):
                prompts[i] = list(ids)
        return prompts

    def _verdict(self, row: dict[str, Any], result: Rendered | RenderError, prompt: list[int] | None, other: Rendered | RenderError | None) -> Labelled:
        for rendered in (result, other):
            if isinstance(rendered, RenderError):
                return Labelled(row, rendered.reason)
        reason = self._said(row) or self._tokens(row, result, prompt) or (other and self._tokens(row, other, prompt)) or None
        limit = self.max_tokens
        return Labelled(row, reason, result, min(result.prompt_length, limit), sum(result.trained[:limit]), min(len(result.input_ids), limit))

    def _said(self, row: dict[str, Any]) -> str | None:
        """A control token written out in a message would be read as the real one, and end a turn in its middle."""
        for part in ("messages", "chosen", "rejected"):
            for turn in row.get(part) or ():
                if found := self.control.search(turn["content"] or ""):
                    return f"a message holds the control token {found[0]}"
        return None

    def _tokens(self, row: dict[str, Any], rendered: Rendered, prompt: list[int] | None) -> str | None:
        ids, trained, text = rendered.input_ids, rendered.trained, row["format"] == "text"
        if True not in trained:
            return "no token is trained"
        bos = self.renderer.bos
        if bos is not None and ids[:2] == [bos, bos]:
            return "BOS is doubled"
        if self.require_bos and self.renderer.adds_bos and ids[0] != bos:
            return "BOS is missing"
        if prompt is not None and ids[: len(prompt)] != prompt:
            return "the prompt's tokens differ from those of inference"
        if prompt is not None and True in trained[: len(prompt)]:
            return "a token of the prompt is trained"
        if not all(ids[i] in self.renderer.special_ids for i in _run_ends(trained)):
            return "the end of the text is not trained" if text else "the end of turn is not trained"
        last = len(trained) - 1 - trained[::-1].index(True)
        if rendered.prompt_length > self.max_tokens or not any(trained[: self.max_tokens]):
            return "prompt exceeds max_tokens"
        if last >= self.max_tokens and not self.truncate:
            return "text is longer than max_tokens" if text else "answer is truncated"
        return None

    def marked(self, rendered: Rendered) -> list[dict[str, Any]]:
        """The row as text in stretches {text, trained}, special tokens shown."""
        stretches: list[dict[str, Any]] = []
        start, ids = 0, rendered.input_ids[: self.max_tokens]
        for i in range(1, len(ids) + 1):
            if i == len(ids) or rendered.trained[i] != rendered.trained[start]:
                stretches.append({"text": self.renderer.tokenizer.decode(ids[start:i]), "trained": rendered.trained[start]})
                start = i
        return stretches


def _head(row: dict[str, Any]) -> list[dict[str, str]]:
    """The turns before the first one that is trained."""
    if row["format"] == "preference":
        turns, first = [*(row["messages"] or []), *row["chosen"]], len(row["messages"] or [])
    else:
        turns, first = row["messages"], 0
    answer = next(i for i, t in enumerate(turns) if i >= first and t["role"] == "assistant")
    return turns[:answer]


def _run_ends(trained: list[bool]) -> list[int]:
    """The position of the last token of each trained stretch."""
    return [i for i, t in enumerate(trained) if t and (i + 1 == len(trained) or not trained[i + 1])]

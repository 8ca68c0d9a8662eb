"""From rows to tokens, through the tokenizer's own chat template and nothing else.

For each assistant turn, the *prefix* is what inference would see (the turns before it, with the generation prompt), and the *answer* is what
the template adds when the turn itself is there. The two are tokenised apart, because inference tokenises the prefix alone: a token that
grew over the border would be one the model never meets. A template whose prefix is not a true prefix rewrites history or hides the
generation prompt; training on it teaches something else than inference asks for, so such a row is refused with a `RenderError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from ftpipe.data.rows import TOOLS
from ftpipe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 512
"""Rows rendered and tokenised together by `Renderer.rows`."""

Message = dict[str, str]


class RenderError(DataError):
    """A row that cannot be rendered so that training and inference agree. `reason` is a short phrase, equal for equal causes."""

    @property
    def reason(self) -> str:
        return self.what


@dataclass(frozen=True)
class Rendered:
    """One row as tokens.

    input_ids: the tokens. trained: as long; True where the token at this position is a target whose loss counts. prompt_length: number of
    tokens before the first trained one (all of them if none is trained).
    """

    input_ids: list[int]
    trained: list[bool]
    prompt_length: int

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained)


@dataclass
class _Piece:
    """A stretch of text that is tokenised by itself. `content` is the turn's text if the piece is an answer; `first` opens the row."""

    text: str
    content: str | None = None
    first: bool = False


class _Tokens:
    """Tokens of one piece; `offsets`, (start, end) in characters, are made only where they are asked for."""

    def __init__(self, encoding: Any, skip: int = 0, shift: int = 0):
        self.encoding, self.skip, self.shift = encoding, skip, shift
        self.ids: list[int] = encoding.ids[skip:]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return [(start - self.shift, end - self.shift) for start, end in self.encoding.offsets[self.skip :]]


class Renderer:
    """Renders rows for one tokenizer. Raises ConfigError if a conversation is asked of a tokenizer without a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.special_ids = frozenset({*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)})
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [self.bos]
        """The tokenizer's own convention: it puts a BOS in front of plain text."""
        self.anchor = self._find_anchor()

    def messages(self, messages: Sequence[Message]) -> Rendered:
        """A conversation; every assistant turn's content and end-of-turn token is trained. What follows the last assistant turn is left out."""
        return self._one({"format": "messages", "messages": messages})

    def text(self, text: str) -> Rendered:
        """Plain text: all tokens but the first are trained. BOS is put in front where the tokenizer does so itself, EOS appended."""
        return self._one({"format": "text", "text": text})

    def preference(self, messages: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[Rendered, Rendered]:
        """Both answers to one prompt. Only the answers are trained, not assistant turns inside the prompt."""
        return self._one({"format": "preference", "messages": messages, "chosen": chosen}), \
            self._one({"format": "preference", "messages": messages, "chosen": rejected})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens inference starts from: the conversation so far and the generation prompt."""
        return self._encode([_Piece(self._template(messages, generate=True), first=True)])[0].ids

    def start(self, text: str) -> list[int]:
        """The tokens that inference goes on from after plain text; BOS is put in front where the tokenizer does so itself."""
        return [self.bos] * self.adds_bos + self._encode([_Piece(text, first=True)])[0].ids

    def continued(self, pairs: Sequence[tuple[str, str]]) -> list[Rendered]:
        """Plain texts, each with what continues it, tokenised apart: the continuation is trained. BOS is put in front where the tokenizer does so itself;
        nothing is appended."""
        encoded = self._encode([piece for text, more in pairs for piece in (_Piece(text, first=True), _Piece(more))])
        results = []
        for text, more in zip(encoded[::2], encoded[1::2]):
            before = [self.bos] * self.adds_bos + text.ids
            results.append(Rendered(before + more.ids, [False] * len(before) + [True] * len(more.ids), len(before)))
        return results

    def row(self, row: dict[str, Any]) -> Rendered:
        """A row of `rows_schema()` by its format; for a preference row the chosen answer, for a judged one the answer if it was called good (see `judged`)."""
        return self._one(row)

    def rows(self, rows: Iterable[dict[str, Any]]) -> Iterator[Rendered | RenderError]:
        """One result per row, in order; much faster than one by one. A row that cannot be rendered yields its error."""
        source = iter(rows)
        while batch := list(islice(source, BATCH)):
            yield from self._batch(batch)

    def _one(self, row: dict[str, Any]) -> Rendered:
        result, = self._batch([row])
        if isinstance(result, RenderError):
            raise result
        return result

    def _batch(self, rows: Sequence[dict[str, Any]]) -> list[Rendered | RenderError]:
        pieces = [self._pieces(row) for row in rows]
        encoded = iter(self._encode([p for found in pieces if not isinstance(found, RenderError) for p in found]))
        results: list[Rendered | RenderError] = []
        for row, found in zip(rows, pieces):
            if isinstance(found, RenderError):
                results.append(found)
                continue
            parts = [(piece, next(encoded)) for piece in found]
            results.append(self._join_text(parts[0][1]) if row["format"] == "text" else self._join(parts))
        return results

    def _pieces(self, row: dict[str, Any]) -> list[_Piece] | RenderError:
        try:
            if row["format"] == "text":
                return [_Piece(row["text"], first=True)]
            history = row["messages"] or []
            if row["format"] == "unpaired" and not row["chosen"]:
                raise RenderError("its answer is called bad (`label: false`)")
            if row["format"] in ("preference", "unpaired"):
                return self._conversation([*history, *row["chosen"]], first=len(history))
            return self._conversation(history, first=0)
        except RenderError as error:
            return error

    def _conversation(self, messages: Sequence[Message], first: int) -> list[_Piece]:
        """The conversation as alternating context and answer; answers are the assistant turns from index `first` on."""
        pieces, done = [], ""
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        if not answers:
            raise RenderError("no assistant turn to train on")
        for i in answers:
            prefix = self._template(messages[:i], generate=True)
            full = self._template(messages[: i + 1], generate=False)
            if not prefix.startswith(done):
                raise RenderError("the chat template rewrites earlier turns when later ones follow")
            if not full.startswith(prefix):
                raise RenderError("the chat template's training rendering does not continue its inference rendering")
            pieces += [_Piece(prefix[len(done):], first=not pieces), _Piece(full[len(prefix):], messages[i]["content"] or "")]
            done = full
        return pieces

    def _template(self, messages: Sequence[Message], generate: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template, so a conversation cannot be rendered", where=str(self.tokenizer.name_or_path),
                              remedy="use an instruction-tuned model, or rows of format `text`")
        tools, messages = tools_of(messages)
        if not messages:
            raise RenderError("the conversation starts with the answer")
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise RenderError(f"the chat template refuses the conversation: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template writes tool definitions into a conversation."""
        name = "name_of_a_tool"
        tools = {"role": TOOLS, "content": json.dumps([{"type": "function", "function": {"name": name, "description": "", "parameters": {
            "type": "object", "properties": {}}}}])}
        said = [{"role": "user", "content": "a"}]
        for turns in ([tools, *said], [tools, {"role": "system", "content": "b"}, *said]):
            try:
                if name in self._template(turns, generate=True):
                    return True
            except RenderError:
                continue
        return False

    def _encode(self, pieces: list[_Piece]) -> list[_Tokens]:
        """The tokens of each piece, without special tokens of the tokenizer's own."""
        if not pieces:
            return []
        texts = [p.text if p.first or not self.anchor else self.anchor[0] + p.text for p in pieces]
        # Texts longer than model_max_length are the caller's business (the label audit), not a reason to print a warning.
        found = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False).encodings
        return [_Tokens(e) if p.first or not self.anchor else _Tokens(e, *self.anchor[1:]) for p, e in zip(pieces, found)]

    def _find_anchor(self) -> tuple[str, int, int] | None:
        """A tokenizer that puts a space in front of any text (SentencePiece's dummy prefix) would put one in front of an answer too, which
        inference never makes. Such pieces are tokenised behind this text, whose tokens and characters are then cut off."""
        def tokens(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        first = self.tokenizer.convert_ids_to_tokens(tokens("a"))[0]
        if not first.startswith(("\u2581", "\u0120")):
            return None
        text = "\n"
        return text, len(tokens(text)), len(text)

    def _join(self, parts: Sequence[tuple[_Piece, _Tokens]]) -> Rendered:
        ids: list[int] = []
        trained: list[bool] = []
        for piece, encoding in parts:
            here = encoding.ids
            n = 0 if piece.content is None else self._answer_length(piece, encoding)
            ids += here
            trained += [True] * n + [False] * (len(here) - n)
        return Rendered(ids, trained, trained.index(True) if True in trained else len(ids))

    def _answer_length(self, piece: _Piece, encoding: _Tokens) -> int:
        """How many leading tokens of an answer are trained: up to its end-of-turn token, or to the last that is not white space."""
        ids = encoding.ids
        special = [i for i, t in enumerate(ids) if t in self.special_ids]
        if len(special) == 1 and special[0] > 0 and piece.text.startswith(piece.content):
            return special[0] + 1  # the usual case: content, end of turn, perhaps a newline
        content = (piece.content or "").strip()
        at = piece.text.rfind(content) if content else -1
        end = at + len(content) if at >= 0 else 0
        offsets = encoding.offsets
        if at < 0 and content:  # the template reshaped the content, so its end cannot be found: the turn ends at the last special token
            return special[-1] + 1 if special else len(ids)
        closing = next((i for i in special if offsets[i][0] >= end), None)
        if closing is not None:
            return closing + 1
        end = len(piece.text.rstrip())
        return sum(1 for start, _ in offsets if start < end)

    def _join_text(self, encoding: _Tokens) -> Rendered:
        ids = [self.bos] * self.adds_bos + list(encoding.ids) + ([self.eos] if self.eos is not None else [])
        return Rendered(ids, [i > 0 for i in range(len(ids))], min(1, len(ids)))


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """A judged answer, good or bad, as the chosen one of a pair, to be rendered whatever it was called; any other row as it is."""
    return row | {"format": "preference", "chosen": row["chosen"] or row["rejected"], "rejected": None} if row["format"] == "unpaired" else row


def tools_of(messages: Sequence[Message]) -> tuple[list[dict[str, Any]] | None, Sequence[Message]]:
    """The tool definitions in front of a conversation (None without any), and the conversation."""
    if not messages or messages[0]["role"] != TOOLS:
        return None, messages
    return _definitions(messages[0]["content"]), messages[1:]


@lru_cache(maxsize=256)
def _definitions(text: str) -> list[dict[str, Any]]:
    try:
        return json.loads(text)
    except ValueError:
        raise RenderError("the tool definitions are no longer JSON") from None

"""Response tuning: learn what answers are like, from answers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.errors import ConfigError, DataError
from ftpipe.train.objective.base import Example
from ftpipe.train.objective.sft import Sft

if TYPE_CHECKING:
    from ftpipe.data.render import Renderer


class ResponseTuning(Sft):
    """Supervised fine-tuning on log p(answer) instead of log p(answer | instruction): of each conversation nothing is left but the answers, each behind the
    chat template's bare header of an assistant turn (An and Kim 2024). Instructions, system prompts and earlier turns of the user are in no sequence.

    The header is what the template's generation prompt adds to a conversation; a template without one is refused. Rows of plain text have no answers.
    """

    paper: ClassVar[str] = "Response Tuning: Aligning Large Language Models without Instruction"
    formats: ClassVar[tuple[str, ...]] = ("messages", "preference", "unpaired")

    def encode(self, rows: Iterable[dict[str, Any]], renderer: Renderer) -> Iterator[Example | DataError]:
        opening, head = header(renderer)
        for example in super().encode(rows, renderer):
            if isinstance(example, DataError):
                yield example
                continue
            ids, trained, before = [*opening], [False] * len(opening), False
            for token, mine in zip(example.input_ids[0], example.trained[0], strict=True):
                if mine and not before:
                    ids += head
                    trained += [False] * len(head)
                if mine:
                    ids.append(token)
                    trained.append(True)
                before = mine
            yield Example(example.row_id, (ids,), (trained,))


def header(renderer: Renderer) -> tuple[list[int], list[int]]:
    """Tokens that open a conversation (BOS, where the template writes one) and those of the bare header of an assistant turn. Raises ConfigError if there are
    none of the latter."""
    turn = [{"role": "user", "content": "a"}]
    tokenizer = renderer.tokenizer
    plain = tokenizer(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=False), add_special_tokens=False)["input_ids"]
    asked = renderer.prompt(turn)
    head = asked[len(plain):]
    if asked[:len(plain)] != plain or not head:
        raise ConfigError("the chat template's generation prompt does not add to the conversation", where=str(tokenizer.name_or_path),
                          remedy="response_tuning needs a template that opens an assistant's turn with a header")
    return ([renderer.bos] if asked[0] == renderer.bos != head[0] else []), head

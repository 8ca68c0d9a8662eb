"""Questions to a model about rows: answers that are letters, with their probabilities, and long work in parts that outlive a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftpipe.data.render import Message, Rendered, RenderError
from ftpipe.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from ftpipe.models.service import ModelService
    from ftpipe.stages.base import StageContext

REFLECTIONS = (
    "Here is a question and an answer that somebody proposed.\n\nQuestion: {question}\n\nProposed answer: {answer}\n\nIs the proposed answer:\n(A) correct\n"
    "(B) incorrect\n(C) I am not sure\nReply with one letter.",
    "Question: {question}\n\nProposed answer: {answer}\n\nCheck it once more. Are you really sure that the proposed answer is correct?\n"
    "(A) yes, it is correct\n(B) no, it is incorrect\n(C) I am not sure\nReply with one letter.",
)
WORTH = (1.0, 0.0, 0.5)
"""What the replies A, B and C to a reflection count for."""


@dataclass
class Asker:
    """Asks one model."""

    service: ModelService

    def prompts(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[list[int] | None]:
        """Each conversation as tokens that an answer can be generated from; None for one that the template refuses, or that leaves too little room for it."""
        found: list[list[int] | None] = []
        for turns in conversations:
            try:
                ids = self.service.renderer.prompt(turns)
            except RenderError:
                ids = []
            found.append(ids if 0 < len(ids) <= self.service.max_length - max_new_tokens else None)
        return found

    def choose(self, questions: Sequence[str], letters: str) -> np.ndarray:
        """(n, k) probabilities with which the reply to each question begins with each of the k letters, among them: rows sum to one. NaN for a question that
        does not fit the model's context. Questions are asked through the chat template; temperature 1. Raises ConfigError if two letters begin alike."""
        import numpy as np

        rendered: list[Rendered] = []
        for question in questions:
            shown = [self.service.renderer.messages([{"role": "user", "content": question}, {"role": "assistant", "content": c}]) for c in letters]
            starts = [r.input_ids[r.prompt_length] for r in shown]
            if len(set(starts)) < len(letters):
                raise ConfigError(f"the tokenizer begins two of the replies {', '.join(letters)} with the same token", remedy="use another model")
            n = shown[0].prompt_length
            rendered += [Rendered(r.input_ids[: n + 1], [False] * n + [True], n) for r in shown]
        scores = self.service.score(rendered)
        nll = np.array([s.nll if s.trained_tokens else np.nan for s in scores], dtype=np.float64).reshape(len(questions), len(letters))
        chance = np.exp(nll.min(axis=1, keepdims=True) - nll)
        return chance / chance.sum(axis=1, keepdims=True)

    def reflect(self, asked: Sequence[tuple[str, str]]) -> np.ndarray:
        """(n,) how correct the model finds an answer to a question: the mean over two ways of asking of P(correct) + P(not sure) / 2. NaN as in `choose`."""
        import numpy as np

        questions = [wording.format(question=q, answer=a) for q, a in asked for wording in REFLECTIONS]
        return (self.choose(questions, "ABC") @ np.array(WORTH)).reshape(len(asked), len(REFLECTIONS)).mean(axis=1)


def in_parts(ctx: StageContext, name: str, items: Sequence[Any], size: int, make: Callable[[Sequence[Any]], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """`make` applied to `items`, `size` at a time, its results (JSON objects) one after the other.

    Each part is kept in `ctx.work / name` when it is done, so that a killed run goes on with the first part it lacks and comes to the same results.
    """
    folder = ctx.work / name
    folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, len(items), size)):
        path = folder / f"{number:06d}.json"
        if not path.exists():
            made = make(items[start:start + size])
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
            os.replace(temporary, path)
        found += json.loads(path.read_text(encoding="utf-8"))
        ctx.progress(min(start + size, len(items)), len(items), name)
    return found

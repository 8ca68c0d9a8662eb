"""Answers of a model to conversations: generated once for each model, setting and conversation, and kept in the workspace's cache."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ftpipe.canonical import digest
from ftpipe.models.kept import Kept
from ftpipe.models.loading import DType
from ftpipe.models.scores import origin

if TYPE_CHECKING:
    from ftpipe.artifacts import Artifact
    from ftpipe.models.service import ModelService
    from ftpipe.stages.base import StageContext

Conversation = Sequence[dict[str, str]]
SAMPLES = 8
"""Samples of one conversation that are drawn in one batch. The batches of a conversation are always whole, so that more samples begin with the fewer."""
GREEDY = 16
"""Conversations of a batch on a GPU when decoding is greedy; on a CPU each goes alone, so that its answer depends on nothing else."""


@dataclass(frozen=True)
class Answer:
    """text: what was generated, without special tokens. finished: it ended by itself, and not at the limit. problem: why there is none, else null."""

    text: str
    finished: bool
    problem: str | None = None

    @property
    def usable(self) -> bool:
        """Whether it is an answer: ended, and not empty."""
        return self.problem is None and self.finished and bool(self.text.strip())


class Answerer:
    """A model that answers conversations. It is loaded when an answer is not known yet, at most once; leaving its `with` lets go of it.

    Args:
        ctx: for the cache, and to report progress; `ctx.notes` gains `generated` and `known`, numbers of conversations.
        model: as the configuration names it. adapter: artifact whose `adapter/` is put on it. dtype: type it is run in.
    """

    def __init__(self, ctx: StageContext, *, model: str, adapter: Artifact | None = None, dtype: DType = "bfloat16"):
        self.ctx, self.model, self.adapter, self.dtype = ctx, model, adapter, dtype

    @cached_property
    def service(self) -> ModelService:
        from ftpipe.models.service import ModelService

        return ModelService.open(self.model, self.ctx.env, adapter=self.adapter.file("adapter") if self.adapter else None, dtype=self.dtype)

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        if "service" in self.__dict__:
            del self.__dict__["service"]
            gc.collect()

    def answers(self, conversations: Sequence[Conversation], *, max_new_tokens: int, samples: int = 1, temperature: float = 0.0, top_p: float = 1.0,
                seed: int = 0) -> list[list[Answer]]:
        """`samples` answers to each conversation, in their order; equal conversations get equal answers.

        A conversation that the chat template refuses, or that leaves no room for `max_new_tokens` in the model's context, has answers with a `problem`. At
        temperature 0 decoding is greedy, and all samples are the same one. Otherwise sample i depends on the conversation, the seed and i alone: not on other
        conversations, and not on how many samples are drawn.
        """
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed if temperature else 0}
        kept = Kept(self.ctx.env.cache / "generations" / digest(origin(self.ctx, self.model, self.adapter, self.dtype) | settings)[:32])
        known = kept.read()
        blocks = -(-samples // SAMPLES) if temperature else 1
        keys = [digest([[t["role"], t["content"]] for t in c]) for c in conversations]
        different = dict(sorted(zip(keys, conversations)))
        missing = [k for k in different if any(f"{k}:{b}" not in known for b in range(blocks))]
        began, done = time.monotonic(), len(different) - len(missing)
        try:
            for key, block, value in self._generate({k: different[k] for k in missing}, blocks, known, settings) if missing else ():
                kept.add(f"{key}:{block}", value)
                known[f"{key}:{block}"] = value
                done += 1 / blocks
                self.ctx.progress(done, len(different), "conversations")
        finally:
            kept.flush()
        self.ctx.notes["generated"] = self.ctx.notes.get("generated", 0) + len(missing)
        self.ctx.notes["known"] = self.ctx.notes.get("known", 0) + len(different) - len(missing)
        if missing:
            self.ctx.log.info("%d conversations answered in %.0f s; %d were known", len(missing), time.monotonic() - began, len(different) - len(missing))
        return [self._of(known, key, blocks, samples) for key in keys]

    def greedy(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """The text of one greedy answer to each conversation; empty where there is none."""
        return [found[0].text for found in self.answers(conversations, max_new_tokens=max_new_tokens)]

    def _of(self, known: dict[str, Any], key: str, blocks: int, samples: int) -> list[Answer]:
        values = [known[f"{key}:{b}"] for b in range(blocks)]
        found = [Answer("", False, v) if isinstance(v, str) else Answer(*pair) for v in values for pair in ([v] if isinstance(v, str) else v)]
        return (found * samples if len(found) == 1 else found)[:samples]

    def _generate(self, asked: dict[str, Conversation], blocks: int, known: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, int, Any]]:
        """(key, block, value) of what is not known: [text, finished] of each answer, or the problem."""
        from ftpipe.data.render import RenderError

        service, limit = self.service, settings["max_new_tokens"]
        prompts: dict[str, list[int]] = {}
        for key, conversation in asked.items():
            try:
                prompt = service.renderer.prompt(conversation)
                problem = None if len(prompt) + limit <= service.max_length else "the prompt leaves no room for an answer"
            except RenderError as error:
                prompt, problem = [], error.reason
            if problem:
                yield from ((key, b, problem) for b in range(blocks))
            else:
                prompts[key] = prompt
        if settings["temperature"]:
            for key, prompt in prompts.items():
                for block in range(blocks):
                    if f"{key}:{block}" not in known:
                        made = service.generate([prompt] * SAMPLES, max_new_tokens=limit, temperature=settings["temperature"], top_p=settings["top_p"],
                                                seed=int(digest([settings["seed"], block])[:12], 16), batch_size=SAMPLES)
                        yield key, block, [[g.text, g.finished] for g in made]
            return
        order = sorted(prompts, key=lambda k: (len(prompts[k]), k))
        size = 1 if service.device.type == "cpu" else GREEDY
        for start in range(0, len(order), size):
            part = order[start:start + size]
            for key, g in zip(part, service.generate([prompts[k] for k in part], max_new_tokens=limit, batch_size=size)):
                yield key, 0, [[g.text, g.finished]]

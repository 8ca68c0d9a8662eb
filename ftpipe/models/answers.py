"""Answers of a model to conversations: generated once for each model, setting and conversation, and kept in the workspace's cache."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.canonical import digest
from ftpipe.models.kept import Kept
from ftpipe.models.loading import DType
from ftpipe.models.scores import origin

if TYPE_CHECKING:
    from ftpipe.artifacts import Artifact
    from ftpipe.models.service import Generation, ModelService
    from ftpipe.stages.base import StageContext

Conversation = Sequence[dict[str, str]] | str
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


class Asked:
    """Conversations put to one model: each answered once for a setting, and the answers kept.

    Args:
        open_: the service, called when an answer is not known yet, at most once. material: JSON of all that decides an answer beside the conversation and
            the settings. cache: folder that answers are kept in, below a folder named after `material` and the settings; None keeps none.

    generated, known: numbers of different conversations so far. tokens, seconds: what generating took, for the speed.
    """

    def __init__(self, open_: Callable[[], ModelService], material: Callable[[], dict[str, Any]], cache: Path | None):
        self.open_, self.material, self.cache = open_, material, cache
        self.generated = self.known = self.tokens = 0
        self.seconds = 0.0

    @cached_property
    def service(self) -> ModelService:
        return self.open_()

    def answers(self, conversations: Sequence[Conversation], **settings: Any) -> list[list[Answer]]:
        """The answers that `each` yields, in the order of the conversations."""
        found = dict(self.each(conversations, **settings))
        return [found[i] for i in range(len(conversations))]

    def each(self, conversations: Sequence[Conversation], *, max_new_tokens: int, samples: int = 1, temperature: float = 0.0, top_p: float = 1.0,
             seed: int = 0) -> Iterator[tuple[int, list[Answer]]]:
        """(index, its `samples` answers) of each conversation, as they become known; equal conversations get equal answers.

        A conversation may be plain text: the model then goes on from its end, without a chat template. One that the chat template refuses, or that leaves
        no room for `max_new_tokens` in the model's context, has answers with a `problem`. At temperature 0 decoding is greedy, and all samples are the
        same one. Otherwise sample i depends on the conversation, the seed and i alone: not on other conversations, and not on how many are drawn.
        """
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed if temperature else 0}
        kept = Kept(self.cache / digest(self.material() | settings)[:32]) if self.cache else None
        known = kept.read() if kept else {}
        blocks = -(-samples // SAMPLES) if temperature else 1
        keys = [digest(c if isinstance(c, str) else [[t["role"], t["content"]] for t in c]) for c in conversations]
        different = dict(sorted(zip(keys, conversations)))
        missing = {k: different[k] for k in different if any(f"{k}:{b}" not in known for b in range(blocks))}
        where: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            where.setdefault(key, []).append(i)
            if key not in missing:
                yield i, self._of(known, key, blocks, samples)
        self.generated, self.known = self.generated + len(missing), self.known + len(different) - len(missing)
        done = len(different) - len(missing)
        try:
            for key, block, value in self._generate(missing, blocks, known, settings) if missing else ():
                if kept:
                    kept.add(f"{key}:{block}", value)
                known[f"{key}:{block}"] = value
                done += 1 / blocks
                self._told(done, len(different))
                if all(f"{key}:{b}" in known for b in range(blocks)):
                    yield from ((i, self._of(known, key, blocks, samples)) for i in where[key])
        finally:
            if kept:
                kept.flush()

    def _told(self, done: float, total: int) -> None:
        """Hears how many different conversations have been answered."""

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
                prompt = service.renderer.start(conversation) if isinstance(conversation, str) else service.renderer.prompt(conversation)
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
                        made = self._timed(service, [prompt] * SAMPLES, max_new_tokens=limit, temperature=settings["temperature"], top_p=settings["top_p"],
                                           seed=int(digest([settings["seed"], block])[:12], 16), batch_size=SAMPLES)
                        yield key, block, [[g.text, g.finished] for g in made]
            return
        order = sorted(prompts, key=lambda k: (len(prompts[k]), k))
        size = 1 if service.device.type == "cpu" else GREEDY
        for start in range(0, len(order), size):
            part = order[start:start + size]
            for key, g in zip(part, self._timed(service, [prompts[k] for k in part], max_new_tokens=limit, batch_size=size)):
                yield key, 0, [[g.text, g.finished]]

    def _timed(self, service: ModelService, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Generation]:
        began = time.monotonic()
        made = service.generate(prompts, **settings)
        self.seconds += time.monotonic() - began
        self.tokens += sum(len(g.ids) for g in made)
        return made


class Answerer(Asked):
    """A model that answers the conversations of a stage. It is loaded when an answer is not known yet, at most once; leaving its `with` lets go of it.

    Args:
        ctx: for the cache, and to report progress; `ctx.notes` gains `generated` and `known`, numbers of conversations.
        model: as the configuration names it. adapter: artifact whose `adapter/` is put on it. dtype: type it is run in.
    """

    def __init__(self, ctx: StageContext, *, model: str, adapter: Artifact | None = None, dtype: DType = "bfloat16"):
        def opened() -> ModelService:
            from ftpipe.models.service import ModelService

            return ModelService.open(model, ctx.env, adapter=adapter.file("adapter") if adapter else None, dtype=dtype)

        super().__init__(opened, lambda: origin(ctx, model, adapter, dtype), ctx.env.cache / "generations")
        self.ctx = ctx

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        if "service" in self.__dict__:
            del self.__dict__["service"]
            gc.collect()

    def answers(self, conversations: Sequence[Conversation], **settings: Any) -> list[list[Answer]]:
        generated, known, began = self.generated, self.known, time.monotonic()
        found = super().answers(conversations, **settings)
        generated, known = self.generated - generated, self.known - known
        self.ctx.notes["generated"] = self.ctx.notes.get("generated", 0) + generated
        self.ctx.notes["known"] = self.ctx.notes.get("known", 0) + known
        if generated:
            self.ctx.log.info("%d conversations answered in %.0f s; %d were known", generated, time.monotonic() - began, known)
        return found

    def greedy(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """The text of one greedy answer to each conversation; empty where there is none."""
        return [found[0].text for found in self.answers(conversations, max_new_tokens=max_new_tokens)]

    def _told(self, done: float, total: int) -> None:
        self.ctx.progress(done, total, "conversations")
